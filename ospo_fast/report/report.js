"use strict";
// Text of records reaches the page through textContent only, never as markup.
(() => {
  const $ = (id) => document.getElementById(id);
  const SVG = document.querySelector("svg").namespaceURI;

  function el(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
    return node;
  }

  function svg(tag, attributes, ...children) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  const signed = (value) => (value === null ? "–" : (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(2));
  const percent = (value) => (value === null ? "–" : (100 * value).toFixed(0) + "%");
  const press = (buttons, chosen) => buttons.forEach((b) => b.setAttribute("aria-pressed", String(b === chosen)));

  // Training curves: the value under the pointer.
  for (const chart of document.querySelectorAll(".chart[data-points]")) {
    const readings = chart.dataset.points.split(";").map((reading) => reading.split(" "));
    const output = chart.parentElement.querySelector("output");
    const cursor = chart.querySelector(".cursor");
    const resting = output.textContent;
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
      const nearest = readings.reduce((best, one) => (Math.abs(one[0] - x) < Math.abs(best[0] - x) ? one : best));
      cursor.removeAttribute("hidden");
      const line = cursor.firstElementChild;
      line.setAttribute("x1", nearest[0]);
      line.setAttribute("x2", nearest[0]);
      cursor.lastElementChild.setAttribute("cx", nearest[0]);
      cursor.lastElementChild.setAttribute("cy", nearest[1]);
      output.textContent = `step ${nearest[2]}: ${nearest[3]}`;
    });
    chart.addEventListener("pointerleave", () => {
      cursor.setAttribute("hidden", "");
      output.textContent = resting;
    });
  }

  // Gallery filters.
  const gallery = $("gallery");
  if (gallery) {
    const buttons = [...gallery.querySelectorAll(".pill")];
    const cards = [...gallery.querySelectorAll(".cards li")];
    let outcome = "";
    const update = () => {
      const kind = $("gallery-kind").value;
      for (const card of cards) {
        card.hidden = Boolean((outcome && card.dataset.outcome !== outcome) || (kind && card.dataset.kind !== kind));
      }
      $("gallery-nothing").hidden = cards.some((card) => !card.hidden);
    };
    for (const button of buttons) {
      button.addEventListener("click", () => {
        outcome = button.dataset.outcome;
        press(buttons, button);
        update();
      });
    }
    $("gallery-kind").addEventListener("change", update);
  }

  // Pair inspector.
  if (!$("data")) return;
  const { items, sources } = JSON.parse($("data").textContent);
  const list = $("list");
  const detail = $("detail");
  const filter = { status: "", overlay: "attention", guide: true };
  let visible = [];
  let selected = null;
  let [hovered, pinned] = [null, null]; // words of the prompt
  let reveal = () => {}; // shows attention and mask of an object, by its index, over both images of the pair; null: none
  items.forEach((item, index) => {
    item.index = index;
    item.haystack = [item.prompt, item.id, item.rejectedPrompt, ...item.variants.map((variant) => variant.prompt)]
      .join("\n")
      .toLowerCase();
  });

  // "base 2, image 3" for base_7 of three hard negatives: its third image of the second one.
  const name = (key, item) => {
    const [, side, index] = /^(base|negative)_(\d+)$/.exec(key) || [];
    if (!side) return key;
    const count = item.variants.length;
    if (!count) return key;
    const image = Math.floor(index / count);
    return `${side} ${(index % count) + 1}${image ? `, image ${image + 1}` : ""}`;
  };

  // A name of a record may be that of a property which every object has.
  const imageOf = (item, key) => (Object.hasOwn(item.images, key) ? item.images[key] : null);

  function imageNode(image, alt, marked) {
    if (!image) return el("span", { class: "missing", role: "img", "aria-label": "no image" }, "no image");
    if (image.source === null) return el("span", { class: "missing", role: "img", "aria-label": image.failure }, image.failure);
    return el("img", { class: "pic" + (marked ? " selected" : ""), src: sources[image.source], alt, decoding: "async" });
  }

  function row(item) {
    const keys = item.pairs[0] || ["base_0", "negative_0"];
    const margin = item.margin === null ? null : el("span", { class: "num" }, signed(item.margin));
    return el(
      "li",
      { role: "option", id: `item-${item.index}`, "aria-selected": "false" },
      el("div", { class: "thumbs" }, keys.map((key) => imageNode(imageOf(item, key), ""))),
      el(
        "div",
        {},
        el("div", { class: "title" }, item.prompt || item.id),
        el(
          "div",
          { class: "sub" },
          el("span", { class: `verdict ${item.status}` }, { kept: "✓", dropped: "✕", unfinished: "…" }[item.status]),
          el("span", { class: "grow" }, item.status === "kept" ? item.kind : `${item.kind}, ${item.reason}`),
          margin,
        ),
      ),
    );
  }

  function refresh() {
    const kind = $("kind").value;
    const reason = $("reason") ? $("reason").value : "";
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    visible = items.filter(
      (item) =>
        (!filter.status || item.status === filter.status) &&
        (!kind || item.kind === kind) &&
        (!reason || item.group === reason) &&
        words.every((word) => item.haystack.includes(word)),
    );
    const sort = $("sort").value;
    if (sort !== "order") {
      const sign = sort === "high" ? -1 : 1;
      const rank = (item) => (item.margin === null ? Infinity : sign * item.margin);
      visible.sort((a, b) => (rank(a) === rank(b) ? a.index - b.index : rank(a) - rank(b)));
    }
    list.replaceChildren(...visible.map(row));
    $("count").textContent = visible.length === items.length ? `${items.length} prompts` : `${visible.length} of ${items.length} prompts`;
    if (!visible.includes(selected)) selected = visible[0] || null;
    show(false);
  }

  function show(scroll) {
    hovered = pinned = null;
    for (const option of list.querySelectorAll("[aria-selected=true]")) option.setAttribute("aria-selected", "false");
    if (!selected) {
      list.removeAttribute("aria-activedescendant");
      detail.replaceChildren(el("p", { class: "nothing" }, "No prompt fits these filters."));
      return;
    }
    const option = $(`item-${selected.index}`);
    option.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", option.id);
    if (scroll) {
      // scrollIntoView would move the page as well as the list.
      const top = option.offsetTop - list.offsetTop;
      if (top < list.scrollTop) list.scrollTop = top;
      else if (top + option.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top + option.offsetHeight - list.clientHeight;
    }
    detail.replaceChildren(...render(selected));
  }

  function move(distance) {
    if (!visible.length) return;
    const place = Math.min(visible.length - 1, Math.max(0, visible.indexOf(selected) + distance));
    selected = visible[place];
    show(true);
  }

  function render(item) {
    return [heading(item), pair(item), variants(item), answers(item)].filter(Boolean);
  }

  // A prompt, with the words of objects that have maps as controls of `reveal`.
  function marked(item, key) {
    if (!item.masks || !item.masks.words) return item[key];
    const word = (text, object) =>
      el("span", { class: "word", role: "button", tabindex: "0", "aria-pressed": "false", "aria-describedby": "word-status", "data-object": object }, text);
    return item.masks.words[key].map(([text, object]) => (object === null ? text : word(text, object)));
  }

  function heading(item) {
    const place = visible.indexOf(item);
    const step = (label, sign, distance, disabled) => {
      const button = el("button", { type: "button", class: "round", "aria-label": label, disabled }, sign);
      button.addEventListener("click", () => move(distance));
      return button;
    };
    const verdict = {
      kept: () =>
        `Kept: ${name(item.pairs[0][0], item)} (score ${signed(item.chosenScore)}) over ${name(item.pairs[0][1], item)} (score ${signed(item.rejectedScore)})` +
        (item.margin === null ? "." : `, a margin of ${item.margin.toFixed(2).replace("-", "\u2212")}.`),
      dropped: () => `Dropped: ${item.reason}.`,
      unfinished: () => `Not selected yet: ${item.reason}.`,
    }[item.status]();
    const terms = [
      ["Concepts", item.concepts],
      ["Relation", item.relation],
      ["Rejected prompt", item.rejectedPrompt && marked(item, "rejectedPrompt")],
    ].filter(([, value]) => value);
    return el(
      "header",
      {},
      el(
        "div",
        { class: "kindline" },
        el("span", { class: "grow" }, [item.kind, item.sub !== item.kind ? item.sub : "", item.id].filter(Boolean).join(" · ")),
        step("Previous prompt", "↑", -1, place <= 0),
        step("Next prompt", "↓", 1, place >= visible.length - 1),
      ),
      el("h3", {}, item.prompt ? marked(item, "prompt") : "(no prompt)"),
      el("p", { class: `judgement ${item.status}` }, verdict.replace(/\.\.$/, ".")),
      terms.length
        ? el("p", { class: "terms" }, terms.flatMap(([label, value], index) => [index ? "  ·  " : "", `${label}: `, el("b", {}, value)]))
        : null,
    );
  }

  // Attention and masks.
  const unpack = (data) => Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const RAMP = [[0, 22, 11, 57, 0.66], [0.35, 120, 28, 109, 0.6], [0.68, 237, 105, 37, 0.64], [1, 252, 232, 120, 0.74]];

  function ramp(value) {
    const high = Math.max(1, RAMP.findIndex((stop) => stop[0] >= value));
    const [a, b] = [RAMP[high - 1], RAMP[high]];
    const t = (value - a[0]) / (b[0] - a[0]);
    return [1, 2, 3, 4].map((part) => a[part] + t * (b[part] - a[part]));
  }

  function canvas(name, grid, color) {
    const node = el("canvas", { class: name, width: grid[1], height: grid[0], "aria-hidden": "true" });
    const context = node.getContext("2d");
    const pixels = context.createImageData(grid[1], grid[0]);
    for (let cell = 0; cell < grid[0] * grid[1]; cell++) {
      const [red, green, blue, alpha] = color(cell);
      pixels.data.set([red, green, blue, 255 * alpha], 4 * cell);
    }
    context.putImageData(pixels, 0, 0);
    return node;
  }

  function outline(mask, [rows, columns]) {
    const on = (r, c) => r >= 0 && c >= 0 && r < rows && c < columns && mask[r * columns + c] > 0;
    let path = "";
    for (let r = 0; r < rows; r++) {
      for (let c = 0; c < columns; c++) {
        if (!on(r, c)) continue;
        if (!on(r - 1, c)) path += `M${c} ${r}h1`;
        if (!on(r + 1, c)) path += `M${c} ${r + 1}h1`;
        if (!on(r, c - 1)) path += `M${c} ${r}v1`;
        if (!on(r, c + 1)) path += `M${c + 1} ${r}v1`;
      }
    }
    const stroke = (kind) => svg("path", { class: kind, d: path, "vector-effect": "non-scaling-stroke", "stroke-linecap": "round" });
    return svg("svg", { class: "outline", viewBox: `0 0 ${columns} ${rows}`, preserveAspectRatio: "none", "aria-hidden": "true" }, stroke("casing"), stroke("edge"));
  }

  const HINT = "Hover, focus or tap an underlined word to see its attention and mask.";
  const dim = (mask, grid) => canvas("dim", grid, (cell) => [8, 9, 12, mask[cell] ? 0 : 0.74]);

  function pair(item) {
    reveal = () => {};
    if (item.status !== "kept") return null;
    const masks = item.masks;
    const sides = [
      ["chosen", item.pairs[0][0], item.chosenScore],
      ["rejected", item.pairs[0][1], item.rejectedScore],
    ];
    const masked = masks && masks.grid;
    const columns = masked ? masks.objects.length + 3 : 2;
    const tiles = [];
    const plain = []; // the frames of the images alone
    const layers = (side, object) => {
      const map = unpack(masks[side].maps[object]);
      const mask = unpack(masks[side].masks[object]);
      return { heat: canvas("heat", masks.grid, (cell) => ramp(map[cell] / 255)), mask, edge: outline(mask, masks.grid) };
    };
    tiles.push(el("span"), el("span", { class: "head" }, "image"));
    if (masked) tiles.push(...masks.objects.map((object, index) => el("span", { class: "head", "data-object": index }, object)), el("span", { class: "head other" }, "all objects"));
    for (const [side, key, score] of sides) {
      const image = imageOf(item, key);
      const alt = `${side} image of: ${item.prompt}`;
      const cover = masked ? el("span", {}, `${percent(masks[side].coverage)} masked`) : null;
      tiles.push(el("div", { class: "who" }, el("b", {}, side), el("span", {}, name(key, item)), el("span", {}, `score ${signed(score)}`), cover));
      plain.push([side, el("div", { class: "frame plain" }, imageNode(image, alt))]);
      tiles.push(plain[plain.length - 1][1]);
      if (!masked) continue;
      masks.objects.forEach((object, index) => {
        const label = `attention to ${object} and its mask over the ${side} image`;
        const { heat, mask, edge } = layers(side, index);
        tiles.push(el("div", { class: "frame object", role: "img", "aria-label": label, "data-object": index }, imageNode(image, ""), heat, dim(mask, masks.grid), edge));
      });
      const union = unpack(masks[side].union);
      tiles.push(
        el("div", { class: "frame union", role: "img", "aria-label": `mask of all objects over the ${side} image` }, imageNode(image, ""), dim(union, masks.grid), outline(union, masks.grid)),
      );
    }
    const grid = el("div", { class: columns > 5 ? "grid many" : "grid" }, tiles);
    grid.style.setProperty("--columns", columns - 1);
    const block = el("section", { class: "pair", "data-overlay": filter.overlay });
    const modes = ["attention", "mask", "image"].map((mode) => {
      const button = el("button", { type: "button", "data-mode": mode, "aria-pressed": String(mode === filter.overlay) }, mode[0].toUpperCase() + mode.slice(1));
      button.addEventListener("click", () => {
        filter.overlay = block.dataset.overlay = mode;
        press(modes, button);
      });
      return button;
    });
    const words = masked && [...masks.words.prompt, ...masks.words.rejectedPrompt].some(([, object]) => object !== null);
    const status = words ? el("p", { class: "legend status", id: "word-status", role: "status" }, HINT) : "";
    if (words) {
      reveal = (object) => {
        block.classList.toggle("reading", object !== null);
        for (const node of grid.querySelectorAll("[data-object]")) node.classList.toggle("read", node.dataset.object === object);
        for (const [side, frame] of plain) {
          for (const layer of frame.querySelectorAll(".heat, .outline")) layer.remove();
          if (object === null) continue;
          const { heat, edge } = layers(side, object);
          frame.append(heat, edge);
        }
        const share = (side) => {
          const mask = unpack(masks[side].masks[object]);
          return `${percent(mask.reduce((sum, cell) => sum + cell, 0) / mask.length)} of the ${side} image`;
        };
        status.textContent = object === null ? HINT : `Mask of \u201c${masks.objects[object]}\u201d: ${share("chosen")}, ${share("rejected")}.`;
      };
    }
    const guide = masked && masks.objects.length ? $("guide").content.firstElementChild.cloneNode(true) : null;
    if (guide) {
      guide.open = filter.guide;
      guide.addEventListener("toggle", () => (filter.guide = guide.open));
    }
    block.append(
      el("div", { class: "blockhead" }, el("h4", {}, "The pair"), masked ? el("div", { class: "segmented inline", role: "group", "aria-label": "Overlay" }, modes) : null),
      status,
      el("div", { class: "overlays" }, grid),
      masked
        ? el("p", { class: "legend" }, `${masks.objects.length ? "Attention to the tokens of each object, dark to bright; outline: the mask." : "Outline: the mask."} IoU of the chosen and rejected masks: ${percent(masks.iou)}.`)
        : el("p", { class: "legend" }, masks ? `No mask: ${masks.reason}.` : "No mask."),
      ...(masks && masks.notes.length ? [el("p", { class: "legend" }, `Note: ${masks.notes.join("; ")}.`)] : []),
      guide || "",
    );
    return block;
  }

  const LONGEST_TABLE = 1e6; // cells

  function plain(word) {
    let end = word.length; // /[.,;:!?]+$/ would take quadratic time
    while (end && ".,;:!?".includes(word[end - 1])) end--;
    return word.slice(0, end).toLowerCase();
  }

  // Words of `text` that are not part of its longest common subsequence with `reference` are marked. Of long texts, for
  // which that takes too long, the words that `reference` does not have.
  function difference(text, reference) {
    const [a, b] = [text.split(/(\s+)/), reference.split(/\s+/)];
    const [plainA, plainB] = [a.map(plain), b.map(plain)];
    if (a.length * b.length > LONGEST_TABLE) {
      const known = new Set(plainB);
      const parts = [];
      let [from, isMarked] = [0, false]; // words of the same kind are one part
      for (let i = 0; i <= a.length; i++) {
        const marks = i < a.length && Boolean(a[i].trim()) && !known.has(plainA[i]);
        if (i < a.length && marks === isMarked) continue;
        const part = a.slice(from, i).join("");
        if (part) parts.push(isMarked ? el("mark", {}, part) : part);
        [from, isMarked] = [i, marks];
      }
      return parts;
    }
    const length = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--) {
      for (let j = b.length - 1; j >= 0; j--) {
        length[i][j] = plainA[i] === plainB[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
      }
    }
    const parts = [];
    let j = 0;
    a.forEach((word, i) => {
      if (!word.trim()) return parts.push(word);
      while (j < b.length && plainA[i] !== plainB[j] && length[i][j + 1] >= length[i + 1][j]) j++;
      if (j < b.length && plainA[i] === plainB[j] && length[i][j] === length[i + 1][j + 1] + 1) {
        j++;
        return parts.push(word);
      }
      return parts.push(el("mark", {}, word));
    });
    return parts;
  }

  function variants(item) {
    if (!item.variants.length) return null;
    const roles = new Map();
    item.pairs.forEach(([chosen, rejected], number) => {
      const which = number ? ` in pair ${number + 1}` : "";
      roles.set(chosen, `, chosen${which}`).set(rejected, `, rejected${which}`);
    });
    const blocks = item.variants.map((variant, index) => {
      const figure = (side, key) => {
        if (!key) return el("figure", {}, imageNode(null), el("figcaption", {}, side, el("br"), "not generated"));
        const image = item.images[key];
        const label = name(key, item).replace(/ \d+/, "");
        const role = roles.get(key) || "";
        const verdict =
          image.kept === null ? null : el("span", { class: `verdict ${image.kept ? "yes" : "no"}` }, image.kept ? "✓ " : "✕ ");
        return el(
          "figure",
          {},
          imageNode(image, `${label}: ${item.prompt}`, role),
          el("figcaption", {}, verdict, el("b", {}, label + role), image.score === null ? "" : ` ${signed(image.score)}`, image.reason ? el("br") : null, image.reason),
        );
      };
      const skipped = variant.reason ? el("p", { class: "small muted" }, `Skipped: ${variant.reason}.`) : null;
      const texts = [
        ["Hard negative", variant.prompt ? difference(variant.prompt, item.prompt) : null],
        ["Prompt of the base image", variant.dense],
        ["Prompt of the negative image", variant.denseNegative ? difference(variant.denseNegative, variant.dense || item.prompt) : null],
      ].filter(([, value]) => value && value.length);
      const [base, ...more] = variant.base;
      return el(
        "div",
        { class: "variant" },
        el("p", { class: "method" }, el("b", {}, `Hard negative ${index + 1}`), variant.method ? `, ${variant.method}` : ""),
        skipped,
        el("div", { class: "two" }, figure("base", base), figure("negative", variant.negative[0]), more.map((key) => figure("base", key))),
        el("dl", { class: "texts" }, texts.flatMap(([label, value]) => [el("dt", {}, label), el("dd", {}, value)])),
      );
    });
    return el("section", {}, el("div", { class: "blockhead" }, el("h4", {}, "Hard negatives and images")), el("div", { class: "variants" }, blocks));
  }

  function answers(item) {
    const keys = Object.keys(item.images);
    if (!item.questions.length || !keys.length) return null;
    const firstNegative = keys.find((key) => key.startsWith("negative"));
    const ofPairs = new Set(item.pairs.flat());
    const classes = (key) => [key === firstNegative ? "cut" : "", ofPairs.has(key) ? "selected" : ""].join(" ").trim();
    const bar = (value, side, lead) => {
      const track = el("i", { class: side });
      track.style.setProperty("--p", `${100 * (value || 0)}%`);
      return [track, el("span", { class: lead ? "lead" : "" }, value === null ? "–" : value.toFixed(2))];
    };
    const cell = (key, question) => {
      const answer = item.images[key].answers[question];
      if (!answer) return el("td", { class: classes(key) }, el("span", { class: "muted" }, "–"));
      const [yes, no, word] = answer;
      return el(
        "td",
        { class: classes(key), title: `${name(key, item)}: yes ${yes === null ? "–" : yes.toFixed(4)}, no ${no === null ? "–" : no.toFixed(4)}${word ? `, answer ${word}` : ""}` },
        el("div", { class: "prob" }, bar(yes, "yes", word === "yes"), bar(no, "no", word === "no")),
      );
    };
    return el(
      "section",
      {},
      el("div", { class: "blockhead" }, el("h4", {}, "Questions and answers"), el("span", { class: "small muted" }, el("span", { class: "swatch" }), "probability of yes", el("span", { class: "swatch no" }), "of no")),
      el(
        "div",
        { class: "answers", tabindex: "0", role: "region", "aria-label": "Questions and answers" },
        el(
          "table",
          {},
          el("thead", {}, el("tr", {}, el("td"), keys.map((key) => el("th", { scope: "col", class: classes(key) }, imageNode(item.images[key], ""), name(key, item))))),
          el("tbody", {}, item.questions.map((question, index) => el("tr", {}, el("th", { scope: "row" }, question), keys.map((key) => cell(key, index))))),
          el("tfoot", {}, el("tr", {}, el("th", { scope: "row" }, "Score"), keys.map((key) => el("td", { class: classes(key) }, signed(item.images[key].score))))),
        ),
      ),
    );
  }

  // A word is shown while the pointer is over it, or from its focus or tap to the next press elsewhere or of itself.
  const wordAt = (event) => event.target.closest(".word");
  function showWord() {
    const word = hovered || pinned;
    for (const node of detail.querySelectorAll(".word")) {
      node.setAttribute("aria-pressed", String(word !== null && node.dataset.object === word.dataset.object));
    }
    reveal(word === null ? null : word.dataset.object);
  }
  let pinnedBefore = null; // at the press: focus comes between it and the click
  document.addEventListener("pointerdown", (event) => {
    pinnedBefore = wordAt(event) && pinned;
    if (pinned && !wordAt(event)) {
      pinned = null;
      showWord();
    }
  });
  detail.addEventListener("pointerover", (event) => {
    hovered = wordAt(event);
    showWord();
  });
  detail.addEventListener("pointerleave", () => {
    hovered = null;
    showWord();
  });
  for (const type of ["focusin", "focusout"]) {
    detail.addEventListener(type, (event) => {
      pinned = type === "focusin" ? wordAt(event) : null;
      showWord();
    });
  }
  detail.addEventListener("click", (event) => {
    const word = wordAt(event);
    if (!word) return;
    pinned = pinnedBefore === word ? null : word;
    pinnedBefore = null;
    showWord();
  });
  detail.addEventListener("keydown", (event) => {
    const word = wordAt(event);
    if (!word || !["Enter", " ", "Escape"].includes(event.key)) return;
    event.preventDefault();
    pinned = event.key === "Escape" || pinned === word ? null : word;
    hovered = null;
    showWord();
  });

  const STEPS = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -Infinity, End: Infinity };
  list.addEventListener("keydown", (event) => {
    if (event.key in STEPS && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      move(STEPS[event.key]);
    }
  });
  list.addEventListener("click", (event) => {
    const option = event.target.closest("[role=option]");
    if (!option) return;
    selected = items[Number(option.id.slice(5))];
    show(false);
    if (matchMedia("(max-width: 980px)").matches) detail.scrollIntoView({ block: "start" });
  });
  const buttons = [...document.querySelectorAll(".controls [data-status]")];
  for (const button of buttons) {
    button.addEventListener("click", () => {
      filter.status = button.dataset.status;
      press(buttons, button);
      refresh();
    });
  }
  $("search").addEventListener("input", refresh);
  for (const id of ["kind", "reason", "sort"]) if ($(id)) $(id).addEventListener("change", refresh);
  document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
  refresh();
})();
