"""Functions of a checkout of KU-AGI/OSPO, the official repository, for `reference.py` and tests/golden/make.py.

The definitions are compiled out of the checkout's files, together with the definitions and imports that they use. The
files as a whole also import Lightning, TRL, pyrootutils (which changes the working folder) and a copy of Janus for
transformers 4, none of which these functions use.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _source
import torch
import torch.nn.functional as F

from ospo_fast.errors import OspoError, UsageError

GRID = 24  # the mask of get_batch_logps has this side, and an image GRID² tokens
EXTRA = "pip install 'ospo-fast[bench]'"
SWAPPED = "policy_swap_chosen_logps"  # the argument of the conditional term
TRAIN, MASKS, SOFT = "ospo/wrapper/train*.py", "ospo/attention/extract_mask.py", "ospo/utils/attn.py"
SELECT = "ospo/utils/step4/construct_pair.py", "ospo/construct_pair.py"


class MissingError(OspoError):
    """A checkout lacks a function, or the function needs a package that is not installed."""


def pad_to_length(tensor: torch.Tensor, length: int, pad_value: float, dim: int = -1) -> torch.Tensor:
    """Take the place of `trl.trainer.utils.pad_to_length`: the sequences here have equal lengths."""
    if tensor.shape[1] != length:
        raise OspoError(f"pad_to_length: got {tensor.shape[1]} positions, expected {length}.")
    return tensor


REPLACED = {"pad_to_length": pad_to_length}


def _names(nodes: list[ast.stmt]) -> set[str]:
    """Return the names that are read in these statements."""
    return {node.id for root in nodes for node in ast.walk(root) if isinstance(node, ast.Name)}


class _WithoutAnnotations(ast.NodeTransformer):
    """Remove annotations and decorators, whose names (typing, numpy types) need not be there."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        node.decorator_list = [d for d in node.decorator_list if ast.unparse(d).startswith("torch.no_grad")]
        self.generic_visit(node)
        return node


class Source:
    """A Python file of the checkout."""

    def __init__(self, root: Path, path: Path) -> None:
        self.root, self.path = root, path
        self.name = path.relative_to(root).as_posix()
        try:
            tree = _WithoutAnnotations().visit(ast.parse(path.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError, OSError, RecursionError, ValueError) as error:
            raise UsageError(f"--reference: {path} is not a file of Python ({error}); check it out again.") from None
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, ast.Import | ast.ImportFrom] = {}  # by the name that they bind
        self.imported: set[str] = set()  # packages that the file names
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.definitions[node.targets[0].id] = node
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                self.imported |= {module.split(".")[0] for module in modules}
                for alias in node.names:
                    self.imports[alias.asname or alias.name.split(".")[0]] = node

    def methods(self) -> Iterator[tuple[str, dict[str, ast.FunctionDef]]]:
        """Return every class of the file with its methods."""
        for name, node in self.definitions.items():
            if isinstance(node, ast.ClassDef):
                yield name, {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}

    def load(self, *names: str, only: tuple[str, ...] = ()) -> SimpleNamespace:
        """Compile definitions of the file and what they use. Of a class: the methods `only` and what those call.

        Raises MissingError for a name that the file lacks and for a package that is not installed, UsageError for code
        that fails as it is defined.
        """
        namespace: dict[str, Any] = {"__name__": f"official:{self.name}"}
        self._define(names, only, namespace)
        return SimpleNamespace(**{name: value for name, value in namespace.items() if name != "__builtins__"})

    def _define(self, names: tuple[str, ...], only: tuple[str, ...], namespace: dict[str, Any]) -> None:
        body, wanted, seen = [], list(names), set()
        while wanted:
            name = wanted.pop()
            if name in seen or name in namespace:
                continue
            seen.add(name)
            if name in REPLACED and name not in self.definitions:
                namespace[name] = REPLACED[name]
            elif name in self.definitions:
                node = self.definitions[name]
                if isinstance(node, ast.ClassDef):
                    node = _reduced(node, only)
                body.append(node)
                wanted += _names([node])
            elif name in self.imports:
                self._import(name, namespace)
            elif name in names:
                raise MissingError(f"{self.name} has no {name}")
        order = list(self.definitions)
        body.sort(key=lambda node: order.index(_defined(node)))
        module = ast.fix_missing_locations(ast.Module(body, []))
        try:
            exec(compile(module, str(self.path), "exec"), namespace)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UsageError(
                f"--reference: {self.name} cannot be loaded ({reason}); check out another commit."
            ) from error

    def _import(self, name: str, namespace: dict[str, Any]) -> None:
        """Execute the import that binds `name`; a module of the checkout is loaded as this file is."""
        node = self.imports[name]
        alias = next(a for a in node.names if (a.asname or a.name.split(".")[0]) == name)
        module = node.module or "" if isinstance(node, ast.ImportFrom) else alias.name
        own = self.root / f"{module.replace('.', '/')}.py"
        if isinstance(node, ast.ImportFrom) and own.is_file():
            namespace[name] = getattr(Source(self.root, own).load(alias.name), alias.name)
            return
        if node.__class__ is ast.ImportFrom and node.level:
            raise MissingError(f"{self.name} imports {name} from a module that is not in the checkout")
        try:
            exec(compile(ast.Module([_single(node, alias)], []), str(self.path), "exec"), namespace)
        except ImportError as error:
            package = module.split(".")[0]
            remedy = f"run: {EXTRA}" if package == "skimage" else f"install {package}"
            raise MissingError(f"{self.name} needs {package}, which cannot be imported ({error}); {remedy}") from error


def _single(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.stmt:
    one: ast.stmt = (
        ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], node.level)
    )
    return ast.fix_missing_locations(ast.copy_location(one, node))


def _defined(node: ast.stmt) -> str:
    return node.targets[0].id if isinstance(node, ast.Assign) else node.name  # type: ignore[attr-defined]


def _reduced(node: ast.ClassDef, only: tuple[str, ...]) -> ast.ClassDef:
    """Return a class without bases that has the methods `only` and the methods that these read from self."""
    methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
    wanted, kept = list(only), {}
    while wanted:
        name = wanted.pop()
        if name in methods and name not in kept:
            kept[name] = methods[name]
            wanted += [inner.attr for inner in ast.walk(methods[name]) if isinstance(inner, ast.Attribute)]
    body: list[ast.stmt] = [item for name, item in methods.items() if name in kept]
    return ast.ClassDef(name=node.name, bases=[], keywords=[], body=body, decorator_list=[])


@dataclass
class Checkout:
    """The functions that a checkout has. `found` says where each is from, `missing` why one is not there."""

    root: Path
    commit: str
    found: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    functions: dict[str, Any] = field(default_factory=dict)
    unused_imports: list[str] = field(default_factory=list)

    def __contains__(self, name: str) -> bool:
        return name in self.functions

    def wrapper(self, part: str, device: str | torch.device = "cpu", **settings: Any) -> Any:
        """Make an instance of the training wrapper of a part, without its __init__, which loads a configuration.

        Settings: beta, gamma_beta_ratio, beta_cond, gamma_beta_ratio_cond, label_smoothing, mask_alpha, mask_gamma,
        simpo_weight, cond_weight, sft_weight, use_mask, conditional.
        """
        weights = [settings.get(f"{name}_weight", 0.0) for name in ("simpo", "sft", "cond")]
        wrapper = self.functions[part]()
        vars(wrapper).update(
            device=torch.device(device),
            label_pad_token_id=-100,
            padding_value=0,
            label_smoothing=settings.get("label_smoothing", 0.0),
            mask_alpha=settings.get("mask_alpha", 1.0),
            mask_gamma=settings.get("mask_gamma", 1.0),
            simpo_clipping_weight=0.0,
            copo_clipping_weight=0.0,
            copo_mode=settings.get("conditional", False),
            simpo_weight=weights[0],
            sft_weight=weights[1],
            copo_weight=weights[2],
            pixel_weight=0.0,
            do_schedule_loss_weight=False,
            schedule_loss_weight=lambda: tuple(weights),  # constants in place of a schedule
            log_by_category=False,
            global_step=0,
            global_rank=0,
            config=SimpleNamespace(use_mask=settings.get("use_mask", False)),
            log=_no_log,
            log_dict=_no_log,
        )
        for name, suffix in (("", ""), ("_1", ""), ("_2", "_cond")):  # names of newer and of older versions
            setattr(wrapper, f"beta{name}", settings.get(f"beta{suffix}"))
            setattr(wrapper, f"gamma_beta_ratio{name}", settings.get(f"gamma_beta_ratio{suffix}"))
        return wrapper


def _no_log(*_: object, **__: object) -> None:
    """Take the place of Lightning's logging."""


def open_checkout(path: Path) -> Checkout:
    """Find the functions of a checkout, of newer and older versions.

    Parts: "log-probabilities", "object weights", "preference loss", "conditional loss", "total loss", "object masks",
    "soft masks", "layer selection", "pair selection". Of several files train.py is first, then the newest.

    Raises UsageError for a folder that is not a checkout, has none of the functions, or fails as it is loaded.
    """
    root = _source.open_folder(path)
    checkout = Checkout(root, _source.git_commit(root) or "unknown")
    sources = [Source(root, file) for file in _train_files(root)]
    for part, method, argument in (
        ("log-probabilities", "get_batch_logps", ""),
        ("object weights", "get_batch_logps", "token_masks"),
        ("preference loss", "simpo_loss", ""),
        ("conditional loss", "simpo_loss", SWAPPED),
    ):
        _add(checkout, part, lambda m=method, a=argument: _method(sources, m, a))
    # Other training files are experiments with other losses.
    main = [source for source in sources if source.path.name == "train.py"]
    _add(checkout, "total loss", lambda: _method(main, "get_batch_loss_metrics", ""))
    _add(checkout, "object masks", lambda: _functions(root, (MASKS,), "process_attn", "attn_map_to_binary"))
    _add(
        checkout, "layer selection", lambda: _functions(root, (MASKS,), "process_attn_per_layer", "select_layer_simple")
    )
    _add(checkout, "soft masks", lambda: _functions(root, (SOFT,), "attn_map_to_soft_mask"))
    _add(checkout, "pair selection", lambda: _functions(root, SELECT, "select_pair"))
    if not checkout.functions:
        reasons = "; ".join(dict.fromkeys(checkout.missing.values()))
        raise UsageError(f"--reference: {path} has none of the functions to compare ({reasons}); run: {_source.CLONE}.")
    used = {name.split(":")[0] for name in checkout.found.values()}
    named = {package for source in used for package in Source(root, root / source).imported}
    loaded = {"torch", "numpy", "skimage", "ospo", ""} | set(sys.stdlib_module_names)
    checkout.unused_imports = sorted(named - loaded)
    return checkout


def _train_files(root: Path) -> list[Path]:
    def age(path: Path) -> tuple[bool, int]:
        number = re.search(r"\d+", path.stem)
        return path.name != "train.py", -int(number[0]) if number else 0

    return sorted(root.glob(TRAIN), key=age)


def _add(checkout: Checkout, part: str, load: Callable[[], tuple[str, Any]]) -> None:
    try:
        checkout.found[part], checkout.functions[part] = load()
    except MissingError as error:
        checkout.missing[part] = str(error)


def _method(sources: list[Source], method: str, argument: str) -> tuple[str, Any]:
    """Return the class, reduced to what `method` uses, of the first file whose method takes `argument`."""
    for source in sources:
        for name, methods in source.methods():
            if method in methods:
                arguments = [a.arg for a in methods[method].args.args]
                if not argument or argument in arguments:
                    return f"{source.name}: {method}", getattr(source.load(name, only=(method,)), name)
    taking = f" with {argument}" if argument else ""
    raise MissingError(f"no {method}{taking} in {TRAIN}")


def _functions(root: Path, files: tuple[str, ...], *names: str) -> tuple[str, Any]:
    for file in files:
        if (root / file).is_file():
            return f"{file}: {', '.join(names)}", Source(root, root / file).load(*names)
    raise MissingError(f"no file {' or '.join(files)}")


# ---------------------------------------------------------------- calls


def batch_logps(wrapper: Any, logits: torch.Tensor, labels: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
    """Call get_batch_logps; some versions return the weights too."""
    options = {} if masks is None else {"token_masks": masks}
    found = wrapper.get_batch_logps(logits, labels, average_log_prob=True, **options)
    return found[0] if isinstance(found, tuple) else found


def object_weights(wrapper: Any, masks: torch.Tensor) -> torch.Tensor:
    """Return the token weights (B, GRID²) within get_batch_logps: the gradient of its sum at two equal logits.

    There the gradient at a token's label is weight · (1 − p) with p = 1/2.
    """
    logits = torch.zeros(len(masks), GRID**2 + 1, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.zeros(logits.shape[:2], dtype=torch.int64)
    labels[:, 0] = -100  # text
    found = wrapper.get_batch_logps(logits, labels, token_masks=masks, average_log_prob=False)
    total = found[0] if isinstance(found, tuple) else found
    (gradient,) = torch.autograd.grad(total.sum(), logits)
    return 2 * gradient[:, :-1, 0]


def preference(wrapper: Any, chosen: torch.Tensor, rejected: torch.Tensor, swapped: torch.Tensor | None) -> Any:
    """Call simpo_loss and return its terms per pair: SimPO, and the conditional term or None."""
    options = {} if swapped is None else {SWAPPED: swapped}
    found = wrapper.simpo_loss(policy_chosen_logps=chosen, policy_rejected_logps=rejected, **options)
    return found["simpo_loss"], found["copo_loss"] if swapped is not None else None


def total_loss(
    wrapper: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Any, masks: torch.Tensor | None
) -> torch.Tensor:
    """Call get_batch_loss_metrics on the last hidden states of chosen, rejected and, if conditional, swapped rows.

    The language model is replaced by the identity.
    """
    decoder = SimpleNamespace(model=lambda inputs_embeds, **_: SimpleNamespace(hidden_states=[inputs_embeds]))
    wrapper.model = SimpleNamespace(language_model=decoder, gen_head=head)
    groups = ("chosen", "rejected", "swap_chosen")[: 3 if wrapper.copo_mode else 2]
    batch: dict[str, Any] = {"item_ids": []}
    for name, x, y in zip(groups, hidden.chunk(len(groups)), labels.chunk(len(groups)), strict=True):
        batch |= {f"{name}_inputs_embeds": x, f"{name}_labels": y, f"{name}_attention_mask": torch.ones_like(y)}
    if masks is not None:
        batch["chosen_token_mask"], batch["rejected_token_mask"] = masks.chunk(2)
    loss: torch.Tensor = wrapper.get_batch_loss_metrics(batch)
    return loss


def thresholds(functions: Any, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the Otsu thresholds that attn_map_to_binary computes for maps (n, H, W), and its masks."""
    filters, recorded = functions.attn_map_to_binary.__globals__["filters"], []

    def record(*arguments: Any, **options: Any) -> Any:
        recorded.append(filters.threshold_otsu(*arguments, **options))
        return recorded[-1]

    functions.attn_map_to_binary.__globals__["filters"] = SimpleNamespace(threshold_otsu=record)
    try:
        masks = [torch.as_tensor(functions.attn_map_to_binary(x)) for x in maps]
    finally:
        functions.attn_map_to_binary.__globals__["filters"] = filters
    return torch.tensor([float(x) for x in recorded], dtype=torch.float64), torch.stack(masks)


def attention_maps(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """Return what process_attn takes: the causal attention probabilities (1, heads, S, S) of each layer, in fp32."""
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    found = []
    for queries, keys in zip(q.float(), k.float(), strict=True):
        scores = queries @ keys.transpose(1, 2) * queries.shape[-1] ** -0.5
        found.append(F.softmax(scores.masked_fill(future, -torch.inf), -1)[None])
    return found


def spans_of(columns: torch.Tensor) -> list[list[int]]:
    """Return the token indices of every object of columns (O, C), whose -1 are padding."""
    return [[int(c) for c in row if c >= 0] for row in columns]
