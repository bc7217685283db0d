"""Log-probabilities of generated codes, and the same bits from a forward pass with gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ospo_fast as of
from ospo_fast.cost import causal
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation import GeneratedBatch, GenerationError, ImageGenerator, exact_hidden_states, exact_logprobs
from ospo_fast.generation.decoder import InferenceDecoder
from ospo_fast.generation.engine import why_not_exact
from ospo_fast.models.layout import image_layout
from ospo_fast.models.resolve import resolve_model
from ospo_fast.ops import Head, token_logprobs
from ospo_fast.stages.teacher_forcing import hidden_states, teacher_forced
from ospo_fast.work import counting, work_of
from tests.models.tiny_families import VARIANTS, build

if TYPE_CHECKING:
    from ospo_fast.models.adapter import Adapter

PROMPTS = [
    "a red circle",
    "two red circles and one blue square",
    "a green cross",
    "one yellow circle and two blue squares",
]
FAMILY_PROMPTS = ["a red circle", "two blue squares and a cross", "a cross"]
LORA = r".*layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down|gate_up)_proj"


@pytest.fixture(scope="module")
def loaded() -> Any:
    model = of.load_model("shapes")
    decoder = InferenceDecoder(model)
    if not decoder.packed:
        pytest.skip("needs the compiled module and a CPU with vector instructions")
    return model


@pytest.fixture
def shapes(loaded: Any) -> Any:
    return type(loaded)(copy.deepcopy(loaded.module), loaded.processor, name="shapes")


@pytest.fixture(params=VARIANTS)
def family(request: pytest.FixtureRequest, loaded: Any) -> Adapter:
    return build(str(request.param))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def draw(model: Any, prompts: Sequence[str | Tensor], seeds: Sequence[int] | None = None, **given: Any) -> Any:
    options = {"output": "codes", "progress": False, "return_logps": True, **given}
    size = options.pop("batch_size", None)
    seeds = range(len(prompts) * given.get("num_images", 1)) if seeds is None else seeds
    return ImageGenerator(model, batch_size=size).generate(prompts, seeds=seeds, **options)


@torch.no_grad()
def recompute(model: Any, prompts: Sequence[str | Tensor], codes: Tensor, size: int, **given: Any) -> Tensor:
    """The log-probabilities in another order and in other batches, of sequences of other lengths."""
    found = torch.full(codes.shape, torch.nan)
    for rows in torch.randperm(len(codes)).split(size):
        found[rows] = exact_logprobs(model, [prompts[n] for n in rows], codes[rows], **given)
    return found


def own_states(model: Any, ids: list[Tensor], codes: Tensor) -> Tensor:
    """The hidden states (N, T, D) that predict the codes, by transformers' own modules."""
    batch = teacher_forced(model, ids, codes)
    hidden = hidden_states(model, batch.embeds, positions=batch.positions)
    places = torch.tensor(image_layout(model).code_positions) - 1
    return torch.stack([row[length + places] for row, length in zip(hidden, batch.lengths, strict=True)])


def own_logits(model: Any, prompts: Sequence[str], codes: Tensor, guidance: float) -> Tensor:
    ids, head = [model.image_prompt(prompt) for prompt in prompts], Head.of(model.head)
    logits = head(own_states(model, ids, codes))
    if guidance != 1:
        unconditional = head(own_states(model, [model.unconditional(one) for one in ids], codes))
        logits = unconditional + guidance * (logits - unconditional)
    return logits


def own_logprobs(model: Any, prompts: Sequence[str], codes: Tensor, guidance: float, temperature: float) -> Tensor:
    logits = own_logits(model, prompts, codes, guidance)
    return F.log_softmax(logits / temperature, -1).gather(-1, codes[..., None])[..., 0]


@pytest.mark.parametrize(("guidance", "count"), [(1.0, 9000), (1.5, 1000)])
def test_ten_thousand_images_have_no_divergence(loaded: Any, guidance: float, count: int) -> None:
    prompts = [PROMPTS[n % 4] for n in range(count)]
    parts = []
    for n in range(0, count, 1000):
        images = range(n, min(n + 1000, count))
        given = {"batch_size": 256 - n // 40, "guidance_scale": guidance}
        parts.append(draw(loaded, prompts[n : n + 1000], images, **given))
    codes, old = (torch.cat(values) for values in zip(*parts, strict=True))
    assert codes.shape == old.shape == (count, 36)
    assert old.dtype == torch.float32
    new = recompute(loaded, prompts, codes, 61, guidance_scale=guidance)
    assert float((new - old).abs().max()) == 0
    ratios = (new - old).exp()
    assert bool((ratios == 1).all())
    assert float((ratios - 1 - (new - old)).mean()) == float((old - new).mean()) == 0  # two estimates of KL
    assert float(old.mean()) < -0.05  # a model that is certain of every code would prove nothing


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5, 5.0])
def test_guidance_and_temperature(loaded: Any, guidance: float, temperature: float) -> None:
    prompts, settings = PROMPTS * 3, {"guidance_scale": guidance, "temperature": temperature}
    codes, old = draw(loaded, prompts, **settings)
    assert torch.equal(codes, draw(loaded, prompts, **settings, return_logps=False))
    assert torch.equal(recompute(loaded, prompts, codes, 5, **settings), old)
    with torch.no_grad():
        expected = own_logprobs(loaded, prompts, codes, guidance, temperature)
    torch.testing.assert_close(old, expected, rtol=1e-4, atol=1e-3)


def test_the_bits_do_not_depend_on_the_number_of_threads(loaded: Any, two_threads: None) -> None:
    prompts = PROMPTS * 6
    codes, found = draw(loaded, prompts, guidance_scale=1.5)
    again = recompute(loaded, prompts, codes, 7, guidance_scale=1.5)
    torch.set_num_threads(1)
    assert torch.equal(draw(loaded, prompts, guidance_scale=1.5)[1], found)
    assert torch.equal(again, found)
    assert torch.equal(recompute(loaded, prompts, codes, 9, guidance_scale=1.5), found)


def test_every_family(family: Adapter) -> None:
    assert InferenceDecoder(family).exact
    prompts = FAMILY_PROMPTS * 3
    for guidance in (1.0, 3.0):
        codes, old = draw(family, prompts, guidance_scale=guidance)
        assert old.shape == (9, image_layout(family).codes)
        assert bool((old < 0).any())
        assert torch.equal(recompute(family, prompts, codes, 4, guidance_scale=guidance), old)
        one, logps = draw(family, prompts[4:5], [4], guidance_scale=guidance)
        assert torch.equal(one[0], codes[4])
        assert torch.equal(logps[0], old[4])


def with_lora(model: Any, **given: Any) -> Any:
    """The model with random LoRA adapters of all layers, as adapter of the package."""
    import peft

    module = copy.deepcopy(model.module).requires_grad_(False)
    options = {"r": 4, "lora_alpha": 9, "lora_dropout": 0.1, "target_modules": LORA, "init_lora_weights": False}
    wrapped = peft.get_peft_model(module, peft.LoraConfig(**options | given))
    for name, weight in wrapped.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return resolve_model(wrapped, model.processor)


def gradients(logps: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((logps * weights).sum(), parameters, allow_unused=True))


def check_gradients(model: Any, prompts: Sequence[str], guidance: float) -> None:
    """Values and gradients are those of the model's own modules, up to rounding."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, model.num_codes, (len(prompts), image_layout(model).codes), generator=generator)
    parameters = [weight for weight in model.module.parameters() if weight.requires_grad]
    found = exact_logprobs(model, prompts, codes, guidance_scale=guidance, temperature=0.8)
    expected = own_logprobs(model, prompts, codes, guidance, 0.8)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    used = 0
    for ours, theirs in zip(gradients(found, parameters), gradients(expected, parameters), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            used += 1
            assert float((ours - theirs).norm()) <= 1e-4 * float(theirs.norm()) + 1e-6
    assert used > 10


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_gradients_are_those_of_the_own_modules(shapes: Any, guidance: float) -> None:
    shapes.module.requires_grad_(True)
    check_gradients(shapes, PROMPTS[:3], guidance)
    shapes.module.requires_grad_(False)
    for layer in shapes.decoder.layers[1:]:
        layer.requires_grad_(True)
    check_gradients(shapes, PROMPTS[:3], guidance)  # a frozen head


def test_gradients_of_every_family(family: Adapter) -> None:
    family.module.requires_grad_(True)
    check_gradients(family, FAMILY_PROMPTS, 2.0)


def test_adapters_have_the_bits_of_generation_and_their_own_gradients(shapes: Any) -> None:
    model = with_lora(shapes)
    model.module.eval()
    assert InferenceDecoder(model).exact
    check_gradients(model, PROMPTS[:3], 1.5)
    model.module.train()  # dropout of adapters is not applied
    codes, old = draw(model, PROMPTS)
    assert torch.equal(recompute(model, PROMPTS, codes, 3), old)
    assert not torch.equal(recompute(shapes, PROMPTS, codes, 3), old)
    assert all(module.training for module in model.decoder.layers)
    layers: list[Any] = [layer for layer in model.module.modules() if hasattr(layer, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    assert torch.equal(recompute(model, PROMPTS, codes, 3), recompute(shapes, PROMPTS, codes, 4))
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    codes, merged = draw(model, PROMPTS)
    assert torch.equal(recompute(model, PROMPTS, codes, 3), merged)


@pytest.mark.parametrize("lora", [True, False])
def test_operations_are_those_of_a_pass_through_the_modules(shapes: Any, lora: bool) -> None:
    """With LoRA the weights of the layers are frozen: their gradient is no work."""
    model = with_lora(shapes) if lora else shapes
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_("lora" in name or not lora)
    codes = torch.zeros(2, image_layout(model).codes, dtype=torch.long)
    with counting(work_of(model)) as work:
        exact_logprobs(model, PROMPTS[:2], codes, guidance_scale=1.0)
    assert work.shapes is not None
    lengths = [len(model.image_prompt(prompt)) + codes.shape[1] - 1 for prompt in PROMPTS[:2]]
    options = {"tokens": sum(lengths), "attended": sum(map(causal, lengths)), "codes": codes.numel()}
    assert work.tokens == sum(lengths)
    assert work.flops == pytest.approx(work.shapes.flops(**options, backward=True, trained=not lora))
    ids = [model.image_prompt(prompt) for prompt in PROMPTS[:2]]
    with counting(work_of(model)) as work:
        hidden_states(model, teacher_forced(model, ids, codes).embeds)
    options = {"tokens": 2 * (max(lengths) + 1), "attended": 2 * causal(max(lengths) + 1)}
    assert work.shapes is not None
    assert work.flops == pytest.approx(work.shapes.flops(**options, backward=True, trained=not lora))


@pytest.mark.parametrize("lora", [True, False])
def test_ratios_are_1_after_each_step_of_an_optimizer(shapes: Any, lora: bool) -> None:
    model = with_lora(shapes) if lora else shapes
    if not lora:
        model.module.requires_grad_(True)
    parameters = [weight for weight in model.module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    generator, weights = ImageGenerator(model), [weight.detach().clone() for weight in parameters]
    for seed in (0, 10, 20):
        codes, old = generator.generate(
            PROMPTS, seeds=range(seed, seed + 4), guidance_scale=1.5, output="codes", return_logps=True
        )
        new = exact_logprobs(model, PROMPTS, codes, guidance_scale=1.5)
        assert torch.equal(new, old)
        ratios = (new - old).exp()
        (ratios * torch.randn(4, 1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(not torch.equal(*pair) for pair in zip(parameters, weights, strict=True)) > 10


def test_log_probabilities_after_truncation_are_those_of_what_is_kept(loaded: Any) -> None:
    for top_k, top_p in ((3, 1.0), (0, 0.8), (20, 0.9), (1, 1.0)):
        given = {"guidance_scale": 1.5, "temperature": 1.3, "top_k": top_k, "top_p": top_p}
        codes, found = draw(loaded, PROMPTS, **given)
        assert torch.equal(codes, draw(loaded, PROMPTS, **given, return_logps=False))
        with torch.no_grad():
            logits = own_logits(loaded, PROMPTS, codes, 1.5) / 1.3
        ordered = logits.sort(-1, descending=True).values
        bound = ordered[..., (top_k or 512) - 1 : top_k or 512]
        if top_p < 1:
            kept = ordered.masked_fill(ordered < bound, -torch.inf).softmax(-1)
            last = (kept.cumsum(-1) - kept < top_p).sum(-1, keepdim=True) - 1
            bound = ordered.gather(-1, last).maximum(bound)
        rows = logits.masked_fill(logits < bound - 1e-4, -torch.inf).log_softmax(-1)
        torch.testing.assert_close(found, rows.gather(-1, codes[..., None])[..., 0], rtol=1e-3, atol=1e-3)
        if top_k == 1:
            assert bool((found == 0).all())


def test_the_most_likely_codes_have_log_probability_0(loaded: Any) -> None:
    codes, logps = draw(loaded, PROMPTS, temperature=0)
    assert torch.equal(codes, draw(loaded, PROMPTS, temperature=0, return_logps=False))
    assert torch.equal(logps, torch.zeros(4, 36))
    assert not bool(logps.signbit().any())


def test_rows_are_in_the_order_of_the_images(loaded: Any) -> None:
    batches: list[GeneratedBatch] = []
    codes, logps = draw(loaded, PROMPTS[:2], range(4), num_images=2, batch_size=3, callback=batches.append)
    ids = [loaded.image_prompt(prompt) for prompt in PROMPTS[:2] for _ in range(2)]
    assert torch.equal(recompute(loaded, ids, codes, 3), logps)
    assert [batch.indices for batch in batches] == [[0, 1, 2], [3]]
    for batch in batches:
        assert batch.logps is not None
        assert torch.equal(batch.logps, logps[batch.indices])
    images, same = draw(loaded, PROMPTS[:2], range(4), num_images=2, output="pil")
    assert len(images) == 4
    assert torch.equal(same, logps)
    draw(loaded, PROMPTS[:1], return_logps=False, callback=batches.append)
    assert batches[-1].logps is None
    empty, none = draw(loaded, [])
    assert empty.shape == none.shape == (0, 36)
    assert exact_logprobs(loaded, [], empty).shape == (0, 36)


def test_failed_images_have_no_log_probabilities(shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [shapes.image_prompt(prompt) for prompt in PROMPTS]
    rare = torch.cat((prompts[1][:2], torch.tensor([shapes.decoder.embed_tokens.num_embeddings - 1]), prompts[1][2:]))
    shapes.decoder.embed_tokens.weight.data[-1] = torch.nan
    prompts[1] = rare
    codes, logps = draw(shapes, prompts, on_error="skip", guidance_scale=1.0)
    assert bool(logps[1].isnan().all())
    assert bool((codes[1] == -1).all())
    rest = [0, 2, 3]
    assert torch.equal(recompute(shapes, [prompts[n] for n in rest], codes[rest], 2, guidance_scale=1.0), logps[rest])
    with pytest.raises(GenerationError) as caught:
        draw(shapes, prompts, guidance_scale=1.0)
    assert torch.equal(caught.value.results[0], codes)
    assert torch.equal(caught.value.results[1][rest], logps[rest])
    with pytest.raises(UsageError, match=r"codes: got values from -1 to .* leave out images that failed"):
        exact_logprobs(shapes, prompts, codes)


def test_the_pieces_give_the_same(loaded: Any) -> None:
    codes, logps = draw(loaded, PROMPTS, guidance_scale=1.0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # has no effect
        hidden = exact_hidden_states(loaded, PROMPTS, codes)
        assert hidden.shape == (4, 36, loaded.hidden_size)
        assert torch.equal(exact_logprobs(loaded, PROMPTS, codes, guidance_scale=1.0), logps)
        assert torch.equal(draw(loaded, PROMPTS, guidance_scale=1.0)[1], logps)
    entropies = token_logprobs(hidden, loaded.head, codes, batch_invariant=True, return_entropy=True)
    assert torch.equal(entropies[0].detach(), logps)
    assert torch.equal(
        exact_logprobs(loaded.module, PROMPTS, codes, processor=loaded.processor, guidance_scale=1.0), logps
    )
    assert torch.equal(token_logprobs(hidden, loaded.head, codes, batch_invariant=True).detach(), logps)


@pytest.mark.parametrize("kind", ["hook", "bfloat16", "dora"])
def test_models_that_are_not_exact_say_so_and_are_within_rounding(shapes: Any, kind: str) -> None:
    """Log-probabilities are those of the logits that were sampled. The own modules differ by rounding."""
    model = shapes
    if kind == "hook":
        model.decoder.layers[2].mlp.register_forward_hook(lambda *_: None)
    elif kind == "dora":
        model = with_lora(shapes, use_dora=True)
        model.module.eval()
    else:
        model.module.to(torch.bfloat16)
    codes, old = draw(model, PROMPTS * 4, guidance_scale=1.5)
    with torch.no_grad():
        expected = own_logprobs(model, PROMPTS * 4, codes, 1.5, 1.0)
    bound = 2.0 if kind == "bfloat16" else 1e-3
    assert float((old - expected.float()).abs().max()) < bound
    assert torch.equal(codes, draw(model, PROMPTS * 4, guidance_scale=1.5, return_logps=False))
    reason = {"hook": "has a forward hook", "bfloat16": "torch.bfloat16 on cpu", "dora": "no linear layers"}[kind]
    with pytest.raises(OspoError, match=f"no exact log-probabilities.*{reason}"):
        exact_logprobs(model, PROMPTS, codes[:4])


def test_heads_of_an_odd_width_and_adapted_heads_are_not_exact(loaded: Any, shapes: Any) -> None:
    decoder = InferenceDecoder(loaded)
    assert why_not_exact(loaded, decoder) is None
    decoder.exact, decoder.head_dim = False, 20
    assert why_not_exact(loaded) is None
    assert "width 20, expected a multiple of 16" in str(why_not_exact(loaded, decoder))
    decoder.packed = False
    assert "no packed weights" in str(why_not_exact(loaded, decoder))
    model = with_lora(shapes, target_modules=r".*generation_head\.vision_head")
    with pytest.raises(OspoError, match="LoRA adapter"):
        exact_logprobs(model, PROMPTS, torch.zeros(4, 36, dtype=torch.long))


def test_bad_input(loaded: Any) -> None:
    codes = torch.zeros(4, 36, dtype=torch.long)
    for wrong in (codes[:3], codes[:, :35], codes.float(), codes[0]):
        with pytest.raises(UsageError, match=r"codes: got .* expected integers \(4, 36\)"):
            exact_logprobs(loaded, PROMPTS, wrong)
    with pytest.raises(UsageError, match="codes: got list"):
        exact_logprobs(loaded, PROMPTS, codes.tolist())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="codes: got values from 0 to 512, expected 0 to 511"):
        exact_logprobs(loaded, PROMPTS, codes + 512 * torch.eye(4, 36, dtype=torch.long))
    with pytest.raises(UsageError, match="codes: got values from 0 to 9223372036854775808"):
        exact_logprobs(loaded, PROMPTS, torch.tensor([[2**63, *[0] * 35]] * 4, dtype=torch.uint64))
    with pytest.raises(UsageError, match="prompts: got a single prompt"):
        exact_logprobs(loaded, "a red circle", codes)
    with pytest.raises(UsageError, match="prompts: got None, expected a list"):
        exact_logprobs(loaded, None, codes)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="must end in begin-of-image"):
        exact_logprobs(loaded, [loaded.image_prompt(PROMPTS[0])[:-1]], codes[:1])
    with pytest.raises(UsageError, match="temperature: got 0"):
        exact_logprobs(loaded, PROMPTS, codes, temperature=0)
    with pytest.raises(UsageError, match="guidance_scale"):
        exact_logprobs(loaded, PROMPTS, codes, guidance_scale=float("nan"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded, "unconditional", lambda ids: ids.repeat(200), raising=False)
        with pytest.raises(
            UsageError, match=r"guidance_scale: the unconditional prompt .* positions, expected at most"
        ):
            exact_logprobs(loaded, PROMPTS, codes)
    with pytest.raises(UsageError, match="return_logps: got True with jacobi_window 4"):
        ImageGenerator(loaded, jacobi_window=4).generate(PROMPTS, seeds=range(4), return_logps=True)


def test_numbers_of_other_libraries_give_the_same_bits(loaded: Any) -> None:
    """A scale in bfloat16 would compute in bfloat16 in one of two places."""
    scale, temperature = torch.tensor(1.7, dtype=torch.bfloat16), np.float32(0.9)
    codes, logps = draw(loaded, PROMPTS, guidance_scale=scale, temperature=temperature)
    same, expected = draw(loaded, PROMPTS, guidance_scale=float(scale), temperature=float(temperature))
    assert torch.equal(codes, same)
    assert torch.equal(logps, expected)
    unsigned = codes.to(torch.uint16)
    found = exact_logprobs(loaded, PROMPTS, unsigned, guidance_scale=scale, temperature=temperature)  # type: ignore[arg-type]
    assert torch.equal(found.detach(), logps)


@pytest.mark.parametrize("temperature", [1e-30, 1e-20, 1e30])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_extreme_temperatures_have_log_probabilities(loaded: Any, temperature: float, truncation: dict) -> None:
    _, logps = draw(loaded, PROMPTS[:1], temperature=temperature, guidance_scale=1.0, **truncation)
    assert logps.isfinite().all()
    assert (logps <= 0).all()
    if temperature < 1:
        assert logps.exp().min() > 0.1  # no more than a few codes tie
    else:
        torch.testing.assert_close(logps[0, :3].exp(), logps[0, :1].exp().expand(3))  # all that are kept, the same
