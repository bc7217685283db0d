"""Recompute the golden values with checkouts of KU-AGI/OSPO, the official implementation.

    python tests/golden/make.py --reference PATH [--reference OLDER] --check
    python tests/golden/make.py --reference PATH [--reference OLDER] --out DIR [--seed N]

Each function is taken from the first checkout that has it: the conditional loss, of preference_loss.json, is in commit
37bb0f0 and no longer in 60db358. A file whose functions are in none of them is skipped, with the reason.

Inputs are those of the committed files: logits, labels, masks, alpha, gamma and grad_coef of masked_logprob; masks,
alpha and gamma of token_weights; log-probabilities and coefficients of preference_loss; q, k, prompt_len, spans,
span_len, skip and scaler of attention_masks; maps of otsu; the records of pair_selection. All else is computed. With
--seed the inputs are random, of the same shapes.

--check compares with the committed files, prints the largest difference of every array, relative to its largest value,
and exits with code 1 if one exceeds 2e-6, or if integers or pairs differ. This executes code of the checkouts.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "bench"))

import _official as official  # noqa: E402
import reference  # noqa: E402

from ospo_fast.errors import OspoError, UsageError  # noqa: E402

TOLERANCE = 2e-6
GROUPS = "chosen", "rejected", "swap"
Values = dict[str, Any]


class Official:
    """The functions of several checkouts: each of the first that has it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.checkouts = [official.open_checkout(path) for path in paths]

    def find(self, part: str) -> official.Checkout:
        """Return the checkout that has this part. Raises MissingError if none has it."""
        for checkout in self.checkouts:
            if part in checkout:
                return checkout
        raise official.MissingError("; ".join(f"{c.commit}: {c.missing[part]}" for c in self.checkouts))


# ---------------------------------------------------------------- outputs from inputs


def masked_logprob(functions: Official, given: Values) -> Values:
    checkout = functions.find("object weights")
    labels, masks = torch.tensor(given["labels"]), torch.tensor(given["masks"])
    wrapper = checkout.wrapper("object weights", mask_alpha=float(given["alpha"]), mask_gamma=float(given["gamma"]))

    def logps(logits: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
        return official.batch_logps(wrapper, logits, labels, masks)

    logits = torch.tensor(given["logits"])
    exact = logits.double().requires_grad_()
    found = logps(exact, masks)
    (gradient,) = torch.autograd.grad((found * torch.tensor(given["grad_coef"])).sum(), exact)
    return {
        "logps": found.detach().numpy(),
        "logps_f32": logps(logits, masks).numpy(),
        "logps_unmasked": logps(logits.double(), None).numpy(),
        "grad_logits": gradient.float().numpy(),
    }


def token_weights(functions: Official, given: Values) -> Values:
    checkout, weights = functions.find("object weights"), []
    for mask, alpha, gamma in zip(given["masks"], given["alpha"], given["gamma"], strict=True):
        wrapper = checkout.wrapper("object weights", mask_alpha=float(alpha), mask_gamma=float(gamma))
        weights.append(official.object_weights(wrapper, torch.tensor(mask)[None])[0].numpy())
    return {"weights": np.stack(weights)}


def preference_loss(functions: Official, given: Values) -> Values:
    checkout = functions.find("conditional loss")
    coefficients = {name: given[name] for name in ("beta", "gamma_beta_ratio", "label_smoothing")}
    coefficients |= {name: given[name] for name in ("beta_cond", "gamma_beta_ratio_cond")}
    groups = [torch.tensor(given[name], dtype=torch.float64, requires_grad=True) for name in GROUPS]
    wrapper = checkout.wrapper("conditional loss", conditional=True, **coefficients)
    simpo, copo = official.preference(wrapper, *groups)
    gradients = torch.autograd.grad((0.8 * simpo + 0.5 * copo).mean(), groups)
    found = {f"grad_{name}": gradient.tolist() for name, gradient in zip(GROUPS, gradients, strict=True)}
    return {"simpo": simpo.tolist(), "copo": copo.tolist(), **found}


def attention_masks(functions: Official, given: Values) -> Values:
    masks, layers, soft = (
        functions.find(part).functions[part] for part in ("object masks", "layer selection", "soft masks")
    )
    attentions = official.attention_maps(torch.tensor(given["q"]), torch.tensor(given["k"]))
    prompt, scaler, skip = int(given["prompt_len"]), float(given["scaler"]), given["skip"].tolist()
    spans = [span.tolist() for span in np.split(given["spans"], np.cumsum(given["span_len"])[:-1])]
    maps, binary = zip(
        *(masks.process_attn(attentions, prompt, span, skip, scaler=scaler) for span in spans), strict=True
    )
    otsu, _ = official.thresholds(masks, torch.stack(maps))
    found: Values = {
        "maps": torch.stack(maps).numpy(),
        "masks": np.stack(binary),
        "otsu": otsu.float().numpy(),
        "union": np.stack(binary).max(0),
        "soft": torch.stack([soft.attn_map_to_soft_mask(x, scaler, 100.0) for x in maps]).numpy(),
    }
    stack = layers.process_attn_per_layer(attentions, prompt, spans[-1], skip)
    for method in ("entropy", "otsu"):
        for reduce in ("max", "mean"):
            layer, best, mask = layers.select_layer_simple(stack, span_reduce=reduce, method=method)
            name = f"select_{method}_{reduce}"
            found |= {f"{name}_layer": np.array(layer), f"{name}_map": best.numpy(), f"{name}_mask": mask.numpy()}
    return found


def otsu(functions: Official, given: Values) -> Values:
    found, _ = official.thresholds(
        functions.find("object masks").functions["object masks"], torch.tensor(given["maps"])
    )
    return {"threshold": found.numpy()}


def pair_selection(functions: Official, given: Values) -> Values:
    select = functions.find("pair selection").functions["pair selection"].select_pair
    return {"expect": select(given["input"], mode="argmax_chosen")}


# ---------------------------------------------------------------- files


def read(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    with np.load(path) as arrays:
        return dict(arrays)


def write(path: Path, values: Any) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(values), encoding="utf-8")
    else:
        np.savez_compressed(path, **values)


FILES: dict[str, Callable[[Official, Values], Values]] = {
    **{f"masked_logprob_{index}.npz": masked_logprob for index in range(3)},
    "token_weights.npz": token_weights,
    "preference_loss.json": preference_loss,
    **{f"attention_masks_{index}.npz": attention_masks for index in range(2)},
    "otsu.npz": otsu,
    "pair_selection.json": pair_selection,
}


def compute(functions: Official, name: str, given: Any) -> list[Values]:
    """Return the outputs of every case of a file; an .npz is one case."""
    return [FILES[name](functions, case) for case in cases_of(given)]


def cases_of(values: Any) -> list[Values]:
    return values if isinstance(values, list) else [values]


def redraw(name: str, values: Any, seed: int) -> Any:
    """Return random inputs of the same shapes."""
    rng = np.random.default_rng([seed, *name.encode()])
    if name == "pair_selection.json":
        return [{"input": record} for record in reference.vqa_records(len(values), seed)]
    if name == "preference_loss.json":
        ranges = {"beta": (1, 6), "beta_cond": (1, 6), "gamma_beta_ratio": (0, 1), "gamma_beta_ratio_cond": (0, 1)}
        return [
            {name: rng.uniform(-5, 0, 4).tolist() for name in GROUPS}
            | {name: rng.uniform(*limits) for name, limits in ranges.items()}
            | {"label_smoothing": float(rng.choice([0.0, 0.1]))}
            for _ in values
        ]
    fresh = dict(values)
    for key in ("logits", "q", "k"):
        if key in values:
            fresh[key] = rng.normal(size=values[key].shape).astype(values[key].dtype)
    if "labels" in values:
        codes = rng.integers(values["logits"].shape[-1], size=values["labels"].shape)
        fresh["labels"] = np.where(values["labels"] == -100, -100, codes)
        fresh["grad_coef"] = rng.normal(size=values["grad_coef"].shape)
    if "weights" in values or "labels" in values:
        fresh["masks"] = (rng.random(values["masks"].shape) < 0.2).astype(np.uint8)
    if name == "otsu.npz":
        fresh["maps"] = rng.random(values["maps"].shape, np.float32) ** 2
    return fresh


def difference(made: Any, committed: Any) -> float:
    """Return the largest difference relative to the largest committed value; the number of others that differ."""
    if committed is None or isinstance(committed, (str, dict)):
        return float(made != committed)
    a, b = np.asarray(made), np.asarray(committed)
    if a.shape != b.shape:
        return float("inf")
    if b.dtype.kind in "iub":
        return float((a != b).sum())
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300))


def compare(name: str, made: list[Values], committed: Any) -> bool:
    """Print the largest difference of every output of a file; return whether all are within the tolerance."""
    pairs = list(zip(made, cases_of(committed), strict=True))
    good = True
    for key in made[0]:
        largest = max(difference(ours[key], theirs[key]) for ours, theirs in pairs)
        passed = largest <= TOLERANCE
        good &= passed
        print(f"{name:<24}{key:<28}{largest:>10.1e}  {'ok' if passed else 'DIFFERENT'}")
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reference", action="append", type=Path, required=True, metavar="PATH", help="a checkout; repeatable"
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with the committed files")
    action.add_argument("--out", type=Path, metavar="DIR", help="folder to write the files into")
    parser.add_argument("--seed", type=int, help="random inputs from this seed, not those of the committed files")
    options = parser.parse_args(arguments)
    if options.check and options.seed is not None:
        parser.error("--seed: --check needs the committed inputs; use it with --out")
    if options.out is not None and options.out.resolve() == HERE:
        parser.error(f"--out: {options.out} holds the committed files, which are never replaced; use another folder")
    try:
        functions = Official(options.reference)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
        for checkout in functions.checkouts:
            print(f"KU-AGI/OSPO {checkout.commit}: {checkout.root}")
        good, skipped = True, []
        for name in FILES:
            committed = read(HERE / name)
            given = committed if options.seed is None else redraw(name, committed, options.seed)
            try:
                made = compute(functions, name, given)
            except official.MissingError as error:
                skipped.append(name)
                print(f"{name:<24}skipped: {error}")
                continue
            if options.check:
                good &= compare(name, made, committed)
            else:
                cases = [{**case, **outputs} for case, outputs in zip(cases_of(given), made, strict=True)]
                write(options.out / name, cases if isinstance(given, list) else cases[0])
        if len(skipped) == len(FILES):
            raise UsageError("none of the files can be computed from these checkouts.")
    except (OspoError, OSError) as error:
        print(f"make.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
