"""Layers of the configuration, and errors for wrong keys and values."""

import dataclasses
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ospo_fast import config
from ospo_fast.config import MODEL_FILES, PRESETS, Config, dump_config, load_config, model_family
from ospo_fast.errors import UsageError
from ospo_fast.loss import OSPOLossConfig
from ospo_fast.stages.train import loss_config

pytestmark = pytest.mark.usefixtures("omegaconf")


def test_defaults_are_the_published_ones():
    config = load_config()
    assert config == Config()
    assert (config.images.guidance_scale, config.images.temperature, config.images.top_k) == (5.0, 1.0, 0)
    assert (config.train.lora_rank, config.train.lora_alpha, config.train.lora_dropout) == (64, 128, 0.05)
    assert (config.train.steps, config.train.learning_rate, config.train.min_learning_rate) == (1000, 1e-5, 1e-7)
    assert (config.train.batch_size, config.train.accumulation, config.train.betas) == (16, 2, [0.9, 0.95])
    assert (config.select.rule, config.select.threshold, config.masks.scaler) == ("v3", 0.6, 0.8)


def test_later_layers_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("images: {guidance_scale: 3}\ntrain: {steps: 7, loss: {beta: 2, mask_blur: 1}}\n")
    overrides = ["train.steps=9", "prompts.counts.color1=3", "train.loss.beta=3"]
    config = load_config(overrides, file=file, family="shapes")
    assert config.images.guidance_scale == 3
    assert config.train.steps == 9
    assert config.prompts.counts == {"color1": 3}
    assert config.train.lora_rank == load_config(family="shapes").train.lora_rank != 64
    assert config.train.loss == {**load_config(family="shapes").train.loss, "beta": 3.0, "mask_blur": 1}
    assert type(config.train.loss["beta"]) is float
    texts = load_config(["train.loss.beta='3'", "train.loss.mask_blur='1'"])  # as the values of other sections
    assert texts.train.loss == {"beta": 3.0, "mask_blur": 1}


@pytest.mark.parametrize("family", MODEL_FILES)
def test_model_files_are_valid(family):
    assert load_config(family=family) != Config()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_the_same_keys(preset):
    keys = {section: set(values) for section, values in PRESETS[preset].items()}
    assert keys["train"] == set(PRESETS["v3"]["train"])
    config = load_config([f"preset={preset}"])
    assert loss_config(config) == OSPOLossConfig.preset(preset)


@pytest.mark.parametrize("method", ["dpo", "sft", "suder", "grpo"])
def test_a_family_does_not_change_what_makes_a_method(method):
    """`method` is another name of `preset`; the optimizer and the number of images are those of the family."""
    named, config = (load_config([f"{key}={method}"], family="shapes") for key in ("preset", "method"))
    assert config == named
    preset, shapes = PRESETS[method], load_config(family="shapes")
    assert config.select.rejected == preset["select"]["rejected"] == "lowest"
    assert (config.select.rule, config.masks.enabled) == (preset["select"]["rule"], False)
    assert loss_config(config) == OSPOLossConfig.preset(method)
    assert config.train.lora_rank == shapes.train.lora_rank
    assert config.images == shapes.images


def test_method_and_preset_together(tmp_path):
    assert load_config(["method=v2", "preset=v2"]).preset == "v2"
    with pytest.raises(UsageError, match="command line: got method='dpo' and preset='v2', which are two names"):
        load_config(["method=dpo", "preset=v2"])
    path = tmp_path / "c.yaml"
    path.write_text("method: dpo\n")
    assert load_config(file=path).preset == "dpo"
    assert load_config(["preset=v1"], file=path).preset == "v1"  # the later layer
    with pytest.raises(UsageError, match="preset should be one of v1"):
        load_config(["method=ppo"])
    for value in ("[1]", "", "null"):
        with pytest.raises(UsageError, match=r"command line: got method=.*, expected one of v1, v2, v3"):
            load_config([f"method={value}"])


def test_preset_v2_has_its_own_rule_and_schedule_and_no_masks():
    config = load_config(["preset=v2"])
    assert (config.select.rule, config.train.schedule, config.train.steps) == ("v2", "constant", 500)
    assert not config.masks.enabled


def test_saved_run_keeps_its_values_and_takes_another_preset(tmp_path):
    saved = tmp_path / "config.yaml"
    first = load_config(["train.steps=7", "images.guidance_scale=2"], family="shapes")
    saved.write_text(dump_config(first))
    assert load_config(saved=saved, family="shapes") == first
    named = load_config(["preset=v3"], saved=saved, family="shapes")
    named.train.loss = first.train.loss
    assert named == first
    saved.write_text(dump_config(load_config(["images.guidance_scale=2", "preset=v2"])))
    assert load_config(saved=saved) == load_config(["images.guidance_scale=2", "preset=v2"])
    changed = load_config(["preset=v3"], saved=saved)
    assert changed == load_config(["images.guidance_scale=2"])


@pytest.mark.parametrize("where", ["command line", "file", "saved run", "saved run of the preset"])
def test_named_preset_brings_its_own_loss(tmp_path, where):
    """The loss of the model family and of the run so far do not count, but values given with the preset do."""
    preset, file, saved = "v2", tmp_path / "mine.yaml", tmp_path / "config.yaml"
    file.write_text(f"preset: {preset}\n")
    before = ["train.loss.simpo_weight=0.7", "train.steps=7"]
    saved.write_text(
        dump_config(load_config(before + [f"preset={preset}"] * where.endswith("preset"), family="shapes"))
    )
    settings = {"family": "shapes", "file": file if where == "file" else None}
    settings["saved"] = saved if where.startswith("saved") else None
    named = [] if where == "file" else [f"preset={preset}"]
    assert load_config(named, **settings).train.loss == {}
    assert load_config([*named, "train.loss.simpo_weight=0.3"], **settings).train.loss == {"simpo_weight": 0.3}


def test_without_a_named_preset_family_and_run_set_the_loss(tmp_path):
    assert load_config(family="shapes").train.loss["simpo_weight"] == 0.25
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_config(load_config(["train.loss.simpo_weight=0.7"], family="shapes")))
    assert load_config(saved=saved, family="shapes").train.loss["simpo_weight"] == 0.7


def test_config_of_an_older_run_loads(tmp_path):
    """Null values of the loss mean the preset's. Removed fields are ignored where they changed nothing."""
    saved, new = tmp_path / "config.yaml", dump_config(load_config(["train.loss.beta=3"], family="shapes"))
    old = new.replace("    beta: 3.0\n", "    beta: 3.0\n    sft_weight: null\n    normalize: null\n")
    old = old.replace("prompts:\n", "prompts:\n  chunk: 64\n  calls_per_batch: 8\n", 1).replace(
        "score:\n", "score:\n  chunk: 64\n"
    )
    old = old.replace("masks:\n", "masks:\n  reduce: max\n", 1).replace(
        "train:\n", "train:\n  unconditional_weight: 0.0\n"
    )
    saved.write_text(old)
    assert load_config(saved=saved) == load_config(["train.loss.beta=3"], family="shapes")
    for before, after in (("reduce: max", "reduce: mean"), ("unconditional_weight: 0.0", "unconditional_weight: 0.5")):
        saved.write_text(old.replace(before, after))
        key, value = after.split(": ")
        with pytest.raises(UsageError, match=rf"config\.yaml: \w+\.{key} has been removed, got '?{value}'?, expected"):
            load_config(saved=saved)


TEXTS = ("model", "out", "device", "templates", "prompts.exclude", "prompts.file", "masks.official")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "images.guidence=2",
            "command line: unknown configuration key 'images.guidence'; nearest: images.guidance_scale",
        ),
        ("simpo_weight=2", "nearest: .*train.loss.simpo_weight"),
        ("train.loss.betta=2", "unknown configuration key 'train.loss.betta'; nearest: .*train.loss.beta"),
        ("train.loss.beta.x=2", "unknown configuration key 'train.loss.beta.x'"),
        ("train.loss.beta=abc", "train.loss.beta is 'abc', expected a finite number"),
        ("train.loss.beta=0", "train.loss.beta is 0.0, expected a positive number"),
        ("train.loss.mask_blur=2", "train.loss.mask_blur is 2, expected an odd number"),
        ("train.loss=3", "command line: .*train.loss"),
        ("train.loss=[]", r"train.loss: got \[\], expected a section or a mapping; write train.loss.NAME=value"),
        ("images.chunk=2", "the configuration key 'images.chunk' has been removed; delete it"),
        ("images.top_k=abc", "could not be converted to Integer .*images.top_k"),
        ("images=3", "command line"),
        ("preset=v9", "preset should be one of v1, v2, v3, full, official, dpo, sft, suder, grpo, got 'v9'"),
        ("iterations=0", "^iterations should be 1 or more, got 0"),
        ("select.rule=v4", "select.rule should be one of v3, v2, best, likeliest, random, got 'v4'"),
        ("masks.layers=best", "masks.layers should be a list of integers, or auto, got 'best'"),
        ("masks.layers=[1,x]", "masks.layers should be a list of integers, or auto"),
        ("masks.heads=[]", "masks.heads should be a list of integers, or auto, got"),
        ("masks.heads=auto", r"masks.heads=auto: got masks.layers=None, expected auto; or name the heads, as in \[3\]"),
        ("masks.choose=best", "masks.choose should be one of entropy, separability, contrast, got 'best'"),
        ("images.jacobi_window=1", r"images.jacobi_window should be 0 \(off\), or 2 or more, got 1"),
        ("images.top_p=0", r"images.top_p should be in \(0, 1\], got 0"),
        ("perturb.temperature=-1", "perturb.temperature should be 0 or more, got -1"),
        ("train.betas=[1]", "train.betas should be two numbers"),
        ("evaluate.seeds=[]", "evaluate.seeds should be a list of at least one number"),
        ("evaluate.seeds=[0,-1]", r"evaluate.seeds should be .* number, each 0 or more, got \[0, -1\]"),
        *((f"{key}=''", f"^{key} should be a text of at least one character, got ''") for key in TEXTS),
        ("prompts.counts.color1=many", "could not be converted"),
        ("noequals", "key=value"),
        ("seed=${oc.env:HOME}", r"seed: got '\$\{oc.env:HOME\}', expected a plain value"),
        ("out=a${seed}", "expected a plain value"),
        ("train.betas=[0.9,'${seed}']", "train.betas.1: got .*expected a plain value"),
        ("prompts.counts={a: '${oc.env:HOME}'}", "prompts.counts.a: got .*expected a plain value"),
        ("model=${", "."),
        ("model=[", "cannot be read as key=value"),
        ("model=\t", "."),
        ("model=\x04", "cannot be read"),
        ("model=!d x", "cannot be read"),
        ("model=\ud800", "lone surrogate"),
        ("model=" + "[" * 5000, "cannot be read"),
        ("=3", "unknown configuration key|cannot be read|command line"),
        ("train.clip=-1", "train.clip should be above 0, got -1"),
        ("train.clip=nan", "train.clip should be finite, got nan"),
        ("train.learning_rate=inf", "train.learning_rate should be finite, got inf"),
        ("train.max_pairs=-1", "train.max_pairs should be 1 or more, got -1"),
        ("train.max_pairs_per_kind=-1", "train.max_pairs_per_kind should be 1 or more"),
        ("train.eval_every=-1", "train.eval_every should be 0 or more"),
        ("train.lora_targets=[]", "train.lora_targets should be a list of at least one name"),
        *[
            (f"train.lora_targets=[q_proj, '{name}']", "train.lora_targets should be .* such as q_proj, got")
            for name in ("", "(", "(?i)q_proj", "q_proj|", "(([a-z_.]*)*)*!", "q proj", "q_pröj", "a\nb")
        ],
        ("evaluate.seeds=[0, -1]", "evaluate.seeds should be a list of at least one number, each 0 or more, got"),
        ("evaluate.guidance_scales=[-1]", "evaluate.guidance_scales should be .* each 0 or more, got"),
        ("evaluate.guidance_scales=[1, 1e308]", r"evaluate.guidance_scales should be at most 1e\+06 in size"),
        ("train.loss.mask_blur=1025", "train.loss.mask_blur is 1025, .* odd number .1: no blur., at most 1023"),
        (f"train.loss.mask_blur={2**63 - 1}", "expected an odd number .1: no blur., at most 1023"),
        ("train.loss.beta=1e308", r"train.loss.beta is 1e\+308, expected a number of at most 1e\+06 in size"),
        ("train.loss.sft_weight='1e7'", "train.loss.sft_weight is .*, expected a number of at most"),
        (
            "train={batch_size: 1024, accumulation: 1025}",
            "at most 1048576 pairs of a step together, got 1024 times 1025",
        ),
        ("prompts.counts={color1: 1000000001}", "prompts.counts should be at most 1000000000, got"),
        ("train.betas=[0.9,1]", r"train.betas should be two numbers in \[0, 1\)"),
        ("masks.skip_layers=-1", "masks.skip_layers should be a number of 0 or more"),
        ("prompts.counts.color1=-1", "prompts.counts should be numbers of 0 or more"),
        ("prompts.patience=0", "prompts.patience should be 1 or more"),
        ("evaluate.guidance_scales=[nan]", "evaluate.guidance_scales should be finite"),
        ("evaluate.seeds=[[1]]", r"evaluate.seeds should hold plain values, got \[\[1\]\]"),
        ("train.lora_targets=[{}]", "train.lora_targets.0: got {}, expected a text; write it in quotes"),
        ("train.lora_targets=[q_proj,010]", "train.lora_targets.1: got 8, expected a text; write it in quotes"),
        ("train.lora_targets=q_proj", r"got 'q_proj', expected a list; write train.lora_targets=\[q_proj\]\.$"),
        ("train.lora_targets=", "train.lora_targets: got None, expected a list"),
        ("evaluate.seeds=0", r"evaluate.seeds: got 0, expected a list; write evaluate.seeds=\[0\]"),
        ("evaluate={seeds: 0}", r"evaluate.seeds: got 0, expected a list; write evaluate.seeds=\[0\]"),
        ("evaluate.guidance_scales=5", r"got 5, expected a list; write evaluate.guidance_scales=\[5\]"),
        ("read_from=/tmp", r"read_from: got '/tmp', expected a list; write read_from=\[/tmp\]"),
        ("train=5", "train: got 5, expected a section or a mapping; write train.NAME=value"),
        ("prompts.counts=5", "prompts.counts: got 5, expected a section or a mapping"),
        ("prompts.counts={1: 2}", "prompts.counts: got {1: 2}, expected texts as keys; write them in quotes"),
        ("prompts={file: 010}", "prompts.file: got 8, expected a text; write it in quotes"),
        ("out=[a]", r"out: got \['a'\], expected a text; write it in quotes"),
        ("out=null", "out: got None, expected a text"),
        ("masks.layers=!!binary aGVsbG8=", "masks.layers: got b'hello', expected a text, number, list or mapping"),
        ("out=!!python/object/apply:pathlib.PosixPath [a]", "could not determine a constructor for the tag"),
        ("device=\\\\???", "expected a plain value; .* are not resolved"),
        ("train={steps: 1, steps: 2}", "the key 'steps' occurs twice"),
        ("train.lora_alpha=16.5", "could not be converted to Integer"),
        ("train.loss.mask_blur=5.5", "train.loss.mask_blur is 5.5, expected an odd number"),
        ("train.betas=[[0.9],0.95]", "train.betas should hold plain values"),
        ("prompts.counts={color1: []}", "prompts.counts should hold plain values"),
        ("seed=???", r"command line: seed: got '\?\?\?', expected a plain value"),
        ("seed=0x" + "f" * 6000, r"seed should be below 2\^63, got an integer of 24000 bits"),
        ("train.clip=1" + "0" * 400, r"train.clip should be below 2\^63"),
        *[
            (f"{section}.batch_size=-1", f"{section}.batch_size should be 1 or more, got -1")
            for section in (
                "prompts",
                "perturb",
                "images",
                "questions",
                "score",
                "select",
                "masks",
                "train",
                "evaluate",
            )
        ],
    ],
)
def test_wrong_overrides_are_named_in_one_line(override, words):
    with pytest.raises(UsageError) as caught:
        load_config([override])
    assert re.search(words, str(caught.value))
    assert "\n" not in str(caught.value)


SEED_KEYS = {"seed", "evaluate.seeds"}  # any integer will do


def numeric_keys(section, prefix=""):
    """The dotted key of each field that holds numbers, and whether they are integers."""
    for item in dataclasses.fields(section):
        if dataclasses.is_dataclass(item.type):
            yield from numeric_keys(item.type, f"{item.name}.")
        elif found := re.search("int|float", str(getattr(item.type, "__name__", "") + str(item.type))):
            yield prefix + item.name, found[0] == "int", "list" in str(item.type)


@pytest.mark.parametrize(("key", "integer", "many"), list(numeric_keys(Config)))
def test_every_number_has_a_limit(key, integer, many):
    """No integer makes an endless loop, and no float leaves the range of float32."""
    for value in (2**63 - 1, 10**9 + 1) if integer else (1e308, -1e308, 1.1e6, 1e-300):
        text = f"{key}.color1={value}" if key == "prompts.counts" else f"{key}={[value] if many else value}"
        if key in SEED_KEYS:
            load_config([text])
            continue
        with pytest.raises(UsageError, match=rf"^{key} should be "):
            load_config([text])


@pytest.mark.parametrize(
    "make",
    [
        lambda text: Config(read_from=[text]),
        lambda text: Config(templates=text),
        lambda text: config.PromptsConfig(counts={text: 1}),
        lambda text: load_config([f"read_from=[{text}]"]),
    ],
)
def test_texts_that_no_file_can_hold_are_refused(make):
    with pytest.raises(UsageError, match="lone surrogate"):
        make("a\udce9")


def test_limits_accept_what_is_used():
    large = ["train.batch_size=1048576", "train.accumulation=1", "train.steps=1000000000", "iterations=10000"]
    large += ["images.draws=10000", "prompts.refresh_every=1000000000", "train.eps=1e-15", "train.loss.mask_blur=1023"]
    assert load_config([*large, "images.guidance_scale=1e6"]).train.batch_size == 2**20
    assert load_config(["train.lora_targets=[self_attn.q_proj, layers.0.mlp.up_proj]"]).train.lora_targets


def test_the_environment_does_not_enter_by_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    path = tmp_path / "config.yaml"
    path.write_text("model: ${oc.env:SECRET}\n")
    for source in ({"file": path}, {"saved": path}):
        with pytest.raises(UsageError, match=r"config\.yaml: model: got '\$\{oc\.env:SECRET\}'") as caught:
            load_config(**source)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "form",
    [
        "{{early_stopping: {}}}",
        "{{loss: {{normalize: {}}}}}",
        "{{lora_targets: [{}]}}",
    ],
)
@pytest.mark.parametrize("kind", ["Path", "PosixPath"])
def test_no_tag_brings_the_environment_into_a_run(tmp_path, monkeypatch, form, kind):
    """OmegaConf's own loader makes paths of these, and resolves what is in them."""
    monkeypatch.setenv("SECRET", "hunter2")
    path = tmp_path / "config.yaml"
    value = form.format(f'!!python/object/apply:pathlib.{kind} ["${{oc.env:SECRET}}"]')
    path.write_text(f"train: {value}\n")
    for source in ({"file": path}, {"saved": path}, {"overrides": [f"train={value}"]}):
        with pytest.raises(UsageError, match=f"constructor for the tag .*pathlib.{kind}'"):
            load_config(**source)


@pytest.mark.parametrize("value", ["!!binary aGVsbG8=", "!!set {a, b}", "!!timestamp 2024-11-01", "!!omap [a: 1]"])
def test_values_of_other_types_are_refused(tmp_path, value):
    path = tmp_path / "c.yaml"
    for key in ("dtype", "prompts", "masks", "read_from"):
        path.write_text(f"{key}: {value}\n")
        with pytest.raises(UsageError, match=rf"c\.yaml: {key}(\.0)?: got "):
            load_config(file=path)
    path.write_text(f"masks: {{layers: {value}}}")
    with pytest.raises(UsageError, match=r"masks\.layers"):
        load_config(file=path)


AS_WRITTEN = (
    "20241101_1230", "2024_11_01", "010", "1e5", "12:30:00", "no", "0x1f", "a #b", "#b", " a", "a: b", "- a", "true",
    "2024-11-01", ".5", "1_0.0", "0b_", "=", "a\\b", "nulls", "C:\\x", "a=b", "ä \U0001f600",
)  # fmt: skip


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_a_text_is_taken_as_it_is_written(text):
    for key in ("out", "device", "prompts.file"):
        found = load_config([f"{key}={text}"])
        assert getattr(found.prompts if "." in key else found, key.split(".")[-1]) == text
    assert load_config([f"out='{text}'"]).out == text
    assert load_config([f"read_from=['{text}']"]).read_from == [text]


def test_null_is_none_and_quotes_are_of_yaml():
    for text in ("null", "~", "", " "):
        assert load_config(["prompts.file=x", f"prompts.file={text}"]).prompts.file is None
    assert load_config(["prompts.file='null'"]).prompts.file == "null"
    assert load_config(['out="a\\tb"']).out == "a\tb"
    assert load_config(["out=!!str 010"]).out == "010"


@pytest.mark.parametrize("value", ["20241101_1230", "010", "no", "0x1f", "1.5", "[a]", "{a: b}"])
def test_a_number_in_the_place_of_a_text_is_refused_in_a_file(tmp_path, value):
    path = tmp_path / "c.yaml"
    for text in (f"out: {value}", f"prompts: {{file: {value}}}", f"read_from: [{value}]", f"select: {{rule: {value}}}"):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"c\.yaml: .*: got .*, expected a text; write it in quotes\.$"):
            load_config(file=path)
    path.write_text("out: 2024-11-01\ntemplates: 1e5\nmodel: 12:30:00")  # no numbers, and no date
    found = load_config(file=path)
    assert (found.out, found.templates, found.model) == ("2024-11-01", "1e5", "12:30:00")


BASE_60 = ("1:30", "-1:1:1", "190:20:30.15", "1" + ":1" * 500)


@pytest.mark.parametrize("text", BASE_60)
def test_numbers_of_base_60_are_texts(tmp_path, text):
    """PyYAML takes quadratic time to read them as numbers."""
    path = tmp_path / "c.yaml"
    for line in (
        f"seed: {text}",
        f"images: {{temperature: {text}}}",
        f"evaluate: {{seeds: [{text}]}}",
        f"train: {{loss: {{beta: {text}}}}}",
    ):
        path.write_text(line)
        with pytest.raises(UsageError, match=re.escape(text[:20])):
            load_config(file=path)
    saved = Config(model=text)
    path.write_text(dump_config(saved))
    assert load_config(file=path) == saved
    for tag in ("int", "float"):
        path.write_text(f"seed: !!{tag} {text}")
        for source in ({"file": path}, {"overrides": [f"seed=!!{tag} {text}"]}):
            with pytest.raises(UsageError, match="is no number; write it without colons"):
                load_config(**source)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("9" * 5000, "5000 digits"),
        ("!!int " + "9" * 5000, "5000 digits"),
        ("0x" + "f" * 5000, "20000 bits"),
        ("9" * 5000 + ".0", "'inf'"),
        ("'" + "9" * 5000 + "'", "Integer"),
    ],
)
def test_long_numbers_are_refused(tmp_path, value, words):
    path = tmp_path / "c.yaml"
    path.write_text(f"seed: {value}")
    with pytest.raises(UsageError, match=rf"c\.yaml.*{words}"):
        load_config(file=path)
    with pytest.raises(UsageError, match=words):
        load_config([f"seed={value}"])


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
@example("\x85\u2028\ufeff")
@example("\ufeffa\r\n b ")
@example("'")
@settings(max_examples=30, deadline=None)
def test_a_saved_text_loads_as_the_same(text):
    if "${" in text or text.lstrip("\\") == "???":
        return
    saved = Config(model=text, read_from=[text, *AS_WRITTEN])
    saved.prompts.file, saved.prompts.counts = text, {text: 3}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_bytes(dump_config(saved).encode())
        assert load_config(file=file) == saved


def test_later_overrides_add_to_mappings_and_replace_lists():
    settings = load_config(
        ["prompts.counts={a: 1, b: 2}", "prompts.counts.b=3", "train.betas=[0.1,0.2]", "train.betas=[0,0]"]
    )
    assert settings.prompts.counts == {"a": 1, "b": 3}
    assert settings.train.betas == [0, 0]


def test_whole_floats_are_integers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {lora_alpha: 16.0, max_pairs: 3.0, loss: {mask_blur: 5.0}}")
    settings = load_config(["train.steps=2.0"], file=path).train
    found = [settings.lora_alpha, settings.max_pairs, settings.steps, settings.loss["mask_blur"]]
    assert found == [16, 3, 2, 5]
    assert all(type(number) is int for number in found)


def test_merges_of_yaml_are_read(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("score: &s {batch_size: 2}\nmasks: &m {<<: *s, skip_layers: 1}\nselect: {<<: *s, pairs: 4}\n")
    settings = load_config(file=path)
    assert (settings.masks.batch_size, settings.masks.skip_layers) == (2, 1)
    path.write_text(
        "images: &s {batch_size: 2}\nperturb: &p {<<: *s, batch_size: 3}\nquestions: {<<: *p, top_p: 0.5}\n"
    )
    settings = load_config(file=path)
    assert (settings.perturb.batch_size, settings.questions.batch_size, settings.questions.top_p) == (3, 3, 0.5)


def test_a_run_folder_does_not_choose_a_template_file(tmp_path):
    own, path = tmp_path / "own.yaml", tmp_path / "config.yaml"
    own.write_bytes((Path(config.__file__).parent / "stages" / "templates" / "shapes.yaml").read_bytes())
    for name in ("./own.yaml", str(own), "../own.yaml"):
        path.write_text(f"templates: {name}\n")
        with pytest.raises(UsageError, match=r"names the template file .*; if you trust the file, name it as well"):
            load_config(saved=path)
        assert load_config([f"templates={own}"], saved=path).templates == str(own)
    path.write_text("templates: janus\n")
    assert load_config(saved=path).templates == "janus"


def test_a_run_folder_does_not_choose_what_is_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(load_config(["read_from=[/data, other]"]), tmp_path))
    with pytest.raises(UsageError, match=r"read_from=\['/data', '.*/other'\]") as caught:
        load_config(saved=path)
    with pytest.raises(UsageError, match=r"names folders to read files from"):
        load_config(["templates=janus"], saved=path)
    named = str(caught.value).split("as well: ")[1].rstrip(".")
    assert load_config([named], saved=path).read_from == ["/data", str(Path("other").resolve())]
    assert load_config(["read_from=[]"], saved=path).read_from == []
    for text in ("read_from: /", "read_from: 5", "read_from: {a: b}"):
        path.write_text(text)
        with pytest.raises(UsageError, match="read_from"):
            load_config(saved=path)
    path.write_text("read_from: []")
    assert load_config(saved=path).read_from == []
    with pytest.raises(UsageError, match=r"read_from should be a list of folders, got \[''\]"):
        load_config(["read_from=['']"])


@pytest.mark.parametrize(
    "text",
    [
        "images: [",
        "model: " + "[" * 5000 + "]" * 5000,
        "model: " + "[" * 300 + "]" * 300,
        "[" * 30_000,  # the loader in C overflows the stack from here on
        "{a: " * 30_000,
        "- " * 30_000,
        "m0: &m0 [x]\n" + "".join(f"m{i}: &m{i} [{', '.join([f'*m{i - 1}'] * 9)}]\n" for i in range(1, 12)),  # 9^11
        "seed: 1\n" * 125_001,
        '"0"',
        "seed: 1\nseed: 2",
        "model: ${model}",
        "- a\n- b",
        "imagse: {top_k: 1}",
        "train: {steps: x}",
        "train: {loss: {betta: 1}}",
    ],
)
def test_wrong_files_are_named(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"c\.yaml"):
        load_config(file=file)


@pytest.mark.parametrize("override", ["model=" + "[" * 30_000, "model=" + "? " * 30_000, "a." * 30_000 + "b=1"])
def test_deep_overrides_are_refused(override):
    with pytest.raises(UsageError, match="nests more than 100 deep") as caught:
        load_config([override])
    assert len(str(caught.value)) < 500


def test_an_alias_is_read_and_a_mark_of_the_byte_order_skipped(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbftrain: {steps: &n 7, batch_size: *n}")
    assert load_config(file=file).train.batch_size == 7


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"Cannot read the configuration file .*none\.yaml"):
        load_config(file=tmp_path / "none.yaml")


def test_family_is_that_of_the_model_or_of_its_base(tmp_path, tiny):
    assert model_family("shapes") == "shapes"
    assert model_family(str(tiny)) == "shapes"
    assert model_family("deepseek-community/Janus-Pro-1B") is None
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{tiny}"}}')
    assert model_family(str(tmp_path)) == "shapes"


def test_a_value_that_omegaconf_cannot_follow(tmp_path, monkeypatch):
    """Lists of up to 100 levels exceed the stack where the caller is deep already."""
    from omegaconf import OmegaConf

    def deep(*_):
        raise RecursionError

    monkeypatch.setattr(OmegaConf, "unsafe_merge", deep)
    with pytest.raises(UsageError, match="nests its values too deeply"):
        load_config(["seed=1"])
