import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ospo_fast
from ospo_fast.cli import EXTRAS

PACKAGE = Path(ospo_fast.__file__).parent

# Layers from top to bottom: a unit imports its own layer and those below it. `experimental` is outside of them: it is
# imported only inside functions, when an option asks for it.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"pipeline", "plan", "report", "env", "settings", "integrations", "export", "push", "evaluation", "reward"},
    {"stages"},
    {"generation", "loss", "models", "records", "config"},
    {"ops"},
    {"kernels", "_C"},
    {
        "cards",
        "cost",
        "errors",
        "fields",
        "loss_config",
        "oom",
        "packages",
        "peak_memory",
        "stats",
        "files",
        "_version",
        "versions",
        "work",
    },
]
RANK = {unit: len(LAYERS) - index for index, layer in enumerate(LAYERS) for unit in layer}


def modules_after(code: str) -> set[str]:
    """Return the modules that a new interpreter has loaded after running the code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_else() -> None:
    loaded = modules_after("import ospo_fast; ospo_fast.__version__; dir(ospo_fast)")
    assert not loaded & {"torch", "numpy", "transformers"}
    assert {name for name in loaded if name.startswith("ospo_fast.")} == {"ospo_fast._version"}


# Every public operation at tiny size, under no_grad and with gradients.
FIRST_CALLS = """
import sys, torch
before = set(sys.modules)
import ospo_fast as of
linear, maps, labels = torch.nn.Linear(8, 16), torch.rand(2, 3, 4, 4), torch.tensor([1])
mlp = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 16))
for grad in (False, True):
    torch.set_grad_enabled(grad)
    hidden = torch.randn(1, 8, requires_grad=grad)
    results = []
    for head in (linear, mlp, of.Head.of(mlp), of.Head(linear.weight.detach())):
        results += of.token_logprobs(hidden, head, labels, return_entropy=True)
        results += [of.token_logprobs(hidden, head, labels, backend=b) for b in ("auto", "torch")]
        results += [of.cross_entropy(hidden, head, labels)]
    logps = torch.randn(2, 4, requires_grad=grad)
    results += [of.sequence_logprobs(logps, torch.ones(2, 4).bool())]
    results += [of.preference_loss(*logps.T[:3], beta=1.0, gamma_beta_ratio=0.5).simpo]
    for preset in ("v1", "v2", "v3", "full"):
        groups, codes = torch.randn(6, 5, 8, requires_grad=grad), torch.tensor([[-100, 1, 2, 3, 4]] * 6)
        rows = 6 if of.OSPOLossConfig.preset(preset).cond_weight else 4
        loss = of.OSPOLoss(of.OSPOLossConfig.preset(preset))
        results += [loss(groups[:rows], codes[:rows], linear, object_masks=torch.rand(4, 2, 2)).loss]
    if grad:
        sum(result.sum() for result in results).backward()
    of.token_weights(maps[:, 0]), of.otsu_threshold(maps), of.object_masks(maps)
    of.attention_columns(maps, maps, torch.zeros(2, 1, 1).long(), rows=(0, 2))
    of.sample_codes(logps, seeds=[0, 1], step=0)
names = {name: getattr(of, name) for name in of.__all__}
print(*sorted(set(sys.modules) - before))
"""


def test_first_calls_import_nothing_but_this_package() -> None:
    """torch._dynamo alone would take as long as importing torch."""
    loaded = subprocess.run([sys.executable, "-c", FIRST_CALLS], check=True, capture_output=True, text=True)
    others = {
        name for name in loaded.stdout.split() if name.split(".")[0] not in {"ospo_fast", *sys.stdlib_module_names}
    }
    assert not others


def test_the_operations_need_torch_and_numpy_only() -> None:
    names = "token_logprobs, Head, object_masks, sample_codes, OSPOLoss, OSPOLossConfig"
    loaded = modules_after(f"from ospo_fast import {names}")
    assert "torch" in loaded
    assert not loaded & {"transformers", "peft", "accelerate", "PIL", "matplotlib", "omegaconf", "skimage", "scipy"}


def test_show_needs_pillow_only_and_only_when_it_is_called() -> None:
    loaded = modules_after("from ospo_fast import show")
    assert not loaded & {"PIL", "transformers", "jinja2", "omegaconf", "matplotlib"}
    call = "show('image.png', torch.rand(1, 6, 6), ['cat'])"
    hidden = f"import sys, torch; sys.modules['PIL'] = None; from ospo_fast import show, errors\ntry: {call}\n"
    modules_after(f"{hidden}except errors.OspoError as error: assert 'pip install pillow' in str(error)\nelse: 1 / 0")


def test_the_extra_is_what_the_stages_import() -> None:
    """A package that nothing imports is not installed for users."""
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "integrations":  # each module imports the library of its name
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).split(".")[0])
    core = {"torch", "numpy", "triton", "ospo_fast"}
    core |= {"typing_extensions", "markupsafe", "regex", "huggingface_hub"}  # come with torch, jinja2 and transformers
    core |= {"spacy", "diffusers", "bitsandbytes", "torchao"}  # of the extras `nouns`, `glm` and `quantize`
    assert imported - sys.stdlib_module_names - core == set(EXTRAS)


def test_public_names_exist() -> None:
    for name in ospo_fast.__all__:
        assert getattr(ospo_fast, name) is getattr(ospo_fast, name)
        assert name in dir(ospo_fast)


# Positional arguments, then keyword arguments, as other projects call them.
SIGNATURES = {
    "token_logprobs": ("hidden head labels", "ignore_index chunk_rows logits_dtype backend"),
    "Head": ("weight bias proj_weight proj_bias", ""),
    "token_weights": ("mask", "alpha gamma blur_size blur_sigma"),
    "sequence_logprobs": ("logps token_mask weights", "normalize"),
    "preference_loss": (
        "chosen rejected swapped",
        "beta gamma_beta_ratio beta_cond gamma_beta_ratio_cond label_smoothing",
    ),
    "attention_columns": ("q k columns", "rows scale lse causal out weight backend"),
    "otsu_threshold": ("maps", "bins"),
    "object_masks": ("maps", "valid scaler bins"),
    "sample_codes": ("cond uncond", "guidance_scale temperature top_k top_p seeds step"),
    "OSPOLoss": ("config", ""),
    "AttentionCapture": ("model", "layers columns rows"),
    "ImageGenerator": ("model", ""),
    "load_model": ("name_or_path", "device dtype"),
    "select_pair": ("record rule rng", ""),
    "show": ("image maps words", ""),
}
PRESET_FIELDS = (
    "beta gamma_beta_ratio beta_cond gamma_beta_ratio_cond simpo_weight cond_weight sft_weight label_smoothing "
    "mask_alpha mask_gamma normalize"
)


def test_public_names_keep_their_arguments() -> None:
    for name, words in SIGNATURES.items():
        positional, keyword = (text.split() for text in words)
        parameters = inspect.signature(getattr(ospo_fast, name)).parameters
        assert list(parameters)[: len(positional)] == positional, name
        assert all(parameters[word].kind is not inspect.Parameter.KEYWORD_ONLY for word in positional), name
        assert set(keyword) <= set(parameters), name


def test_public_methods_and_fields() -> None:
    assert list(inspect.signature(ospo_fast.OSPOLoss.forward).parameters) == [
        "self",
        "hidden",
        "labels",
        "head",
        "object_masks",
        "reference_logps",
    ]
    for preset in ("v1", "v2", "v3", "full"):
        assert set(PRESET_FIELDS.split()) <= set(vars(ospo_fast.OSPOLossConfig.preset(preset)))
    assert callable(ospo_fast.Head.of)
    assert set(SIGNATURES) | {"OSPOLossConfig"} <= set(ospo_fast.__all__)


def test_public_name_is_that_of_its_module() -> None:
    ops = importlib.import_module("ospo_fast.ops")
    assert ospo_fast.token_logprobs is ops.token_logprobs
    wrong = "token_logprob"
    with pytest.raises(AttributeError, match="no attribute 'token_logprob'"):
        getattr(ospo_fast, wrong)


def units(path: Path) -> set[str]:
    """Return the units of ospo_fast that a module imports, anywhere in it."""
    return {name.split(".")[1] for name in names(path) if name.startswith("ospo_fast.")} & set(RANK)


def names(path: Path, *, inside_functions: bool = True) -> set[str]:
    """Return the dotted names that a module imports."""
    found = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)
    return found


def files(unit: str) -> list[Path]:
    return [*PACKAGE.glob(f"{unit}.py"), *(PACKAGE / unit).rglob("*.py")]


def test_no_unit_imports_a_higher_one() -> None:
    for unit in set(RANK) - {"_C", "_version"}:
        assert files(unit), unit
        higher = {(path.name, other) for path in files(unit) for other in units(path) if RANK[other] > RANK[unit]}
        assert not higher, unit


def test_core_imports_experimental_only_inside_functions() -> None:
    paths = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "experimental"]
    assert len(paths) > 60
    for path in paths:
        found = names(path, inside_functions=False)
        assert not [name for name in found if name.startswith("ospo_fast.experimental")], path


def test_nothing_imports_the_integrations() -> None:
    """They are for their users alone, who have the libraries that they need."""
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "integrations":
            assert not [name for name in names(path) if name.startswith("ospo_fast.integrations")], path


def test_stages_do_not_import_the_scenes() -> None:
    """Nothing that generates, judges or trains on images knows the Shapes world. Only commands use its evaluation."""
    paths = [path for layer in LAYERS[2:] for unit in layer for path in files(unit)]
    assert len(paths) > 40
    assert not [path.name for path in paths if any(name.startswith("ospo_fast.shapes") for name in names(path))]


def test_checker_does_not_import_a_model() -> None:
    """The checker has no learned parts."""
    known = {name for name in names(PACKAGE / "shapes" / "checker.py") if name.startswith(("ospo_fast", "torch"))}
    assert known
    assert {name.rsplit(".", 1)[0] for name in known} <= {"ospo_fast.shapes.render", "ospo_fast.shapes.scenes"}
    for module in ("render", "scenes"):
        assert not {name for name in names(PACKAGE / "shapes" / f"{module}.py") if "models" in name or "torch" in name}
