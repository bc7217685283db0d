"""ImageGenerator takes modules of transformers, in the wrappers that users have, and refuses the others."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation import ImageGenerator
from ospo_fast.models.resolve import resolve_model

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel

PROMPTS = ["a red circle", "two blue squares and a red circle"]


@pytest.fixture
def ids(tiny: JanusUnifiedModel) -> list[torch.Tensor]:
    return [tiny.image_prompt(prompt) for prompt in PROMPTS]


def codes(model: Any, prompts: Any, processor: Any = None) -> torch.Tensor:
    found: torch.Tensor = ImageGenerator(model, processor).generate(
        prompts, seeds=[3, 4], output="codes", progress=False
    )
    return found


def test_a_module_gives_the_codes_of_its_adapter(tiny: JanusUnifiedModel, ids: list[torch.Tensor]) -> None:
    expected = codes(tiny, PROMPTS)
    assert torch.equal(codes(tiny.module, ids), expected)
    assert torch.equal(codes(tiny.module, PROMPTS, tiny.processor), expected)
    generator = ImageGenerator(tiny.module, processor=tiny.processor)
    (image,) = generator.generate(PROMPTS[:1], seeds=[3])
    assert image.tobytes() == tiny.decode_codes(expected[:1])[0].tobytes()
    assert resolve_model(tiny) is tiny


def test_the_loaded_checkpoint_gives_the_codes_of_load_model() -> None:
    from transformers import JanusForConditionalGeneration, JanusProcessor

    from ospo_fast import load_model
    from ospo_fast.models import find_model

    folder = str(find_model("shapes"))
    model, module = load_model("shapes"), JanusForConditionalGeneration.from_pretrained(folder)
    expected = codes(model, PROMPTS)
    assert torch.equal(codes(module, [model.image_prompt(prompt) for prompt in PROMPTS]), expected)
    assert torch.equal(codes(module, PROMPTS, JanusProcessor.from_pretrained(folder)), expected)
    assert resolve_model(module).name == folder


def test_the_users_module_stays_as_it_is(tiny: JanusUnifiedModel) -> None:
    module = tiny.module
    del module.config.template_set
    module.name_or_path = "somewhere"

    def state() -> tuple[Any, ...]:
        return module.config.to_dict(), module.generation_config.to_dict(), module.name_or_path, module.training

    before = copy.deepcopy(state())
    codes(module, PROMPTS, tiny.processor)
    assert state() == before


def test_without_a_processor_texts_and_images_are_refused_before_generation(
    tiny: JanusUnifiedModel, ids: list[torch.Tensor]
) -> None:
    tiny.head.register_forward_pre_hook(lambda *_: pytest.fail("generated"))
    generator = ImageGenerator(tiny.module)
    with pytest.raises(UsageError, match=r"got a text \('a red circle'\), expected token ids .*pass processor="):
        generator.generate(PROMPTS, seeds=[0, 1], output="codes")
    for given in ({}, {"output": "pil"}, {"output": "pt"}):
        with pytest.raises(UsageError, match=r"output: got 'p.*', which needs the image statistics .*pass processor="):
            generator.generate(ids, seeds=[0, 1], **given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"token ids must end in begin-of-image \(5\), got"):
        generator.generate([ids[0][:-1]], seeds=[0], output="codes")


def test_special_ids_are_those_of_transformers_or_refused(tiny: JanusUnifiedModel, ids: list[torch.Tensor]) -> None:
    expected, settings = codes(tiny, PROMPTS), tiny.module.generation_config
    found: Any = resolve_model(tiny.module)
    assert (found.bos_id, found.pad_id, found.boi_id) == (tiny.bos_id, tiny.pad_id, tiny.boi_id)
    for name in ("bos_token_id", "pad_token_id"):
        before = getattr(settings, name)
        for wrong in (None, 10**6, [before]):
            setattr(settings, name, wrong)
            with pytest.raises(OspoError, match=rf"generation_config\.{name} of .* set it, or pass processor="):
                ImageGenerator(tiny.module)
        setattr(settings, name, before)
    for wrong in (None, {}, {"boi_token_id": "<boi>"}):
        settings.generation_kwargs = wrong
        with pytest.raises(OspoError, match=r"generation_config\.generation_kwargs\['boi_token_id'\] of "):
            ImageGenerator(tiny.module)
    settings.generation_kwargs = None
    assert torch.equal(codes(tiny.module, PROMPTS, tiny.processor), expected)  # the processor knows it


def test_adapters_of_peft_are_part_of_the_model(tiny: JanusUnifiedModel, ids: list[torch.Tensor]) -> None:
    import peft

    plain = codes(tiny, ids)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|down_proj)", init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(tiny.module), config)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.mul_(30)
    found = codes(wrapped, ids)
    assert not torch.equal(found, plain)
    assert torch.equal(codes(wrapped, PROMPTS, tiny.processor), found)
    with wrapped.disable_adapter():
        assert torch.equal(codes(wrapped, ids), plain)
    assert torch.equal(codes(tiny.with_module(wrapped.get_base_model(), name="adapted"), ids), found)


def test_adapters_of_peft_that_need_its_forward_pass_are_refused(tiny: JanusUnifiedModel) -> None:
    import peft

    sizes = {"num_layers": 3, "num_attention_heads": 4, "token_dim": 64, "num_transformer_submodules": 1}
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes),
        peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[3], target_modules=["q_proj"]),
    ):
        with pytest.raises(OspoError, match=r"adapter 'default' acts in the forward pass of the whole model"):
            ImageGenerator(peft.get_peft_model(copy.deepcopy(tiny.module), config))


def test_other_wrappers(tiny: JanusUnifiedModel, ids: list[torch.Tensor]) -> None:
    expected = codes(tiny, ids)
    assert torch.equal(codes(torch.compile(tiny.module, backend="eager"), ids), expected)
    assert torch.equal(codes(nn.DataParallel(tiny.module), ids), expected)
    sharded = type("FullyShardedDataParallel", (nn.Module,), {})()
    with pytest.raises(OspoError, match="got FullyShardedDataParallel, expected whole weights"):
        ImageGenerator(sharded)


def test_hooks_of_a_module_take_effect(tiny: JanusUnifiedModel, ids: list[torch.Tensor]) -> None:
    before = codes(tiny.module, ids)
    handle = tiny.decoder.layers[1].mlp.register_forward_hook(lambda _, __, y: -9 * y)
    hooked = codes(tiny, ids)
    assert torch.equal(codes(tiny.module, ids), hooked)
    assert not torch.equal(hooked, before)
    handle.remove()
    assert torch.equal(codes(tiny.module, ids), before)


def test_parts_that_are_replaced_in_the_module_take_effect(tiny: JanusUnifiedModel, ids: list[torch.Tensor]) -> None:
    generator = ImageGenerator(tiny.module)

    def now() -> torch.Tensor:
        found: torch.Tensor = generator.generate(ids, seeds=[3, 4], output="codes", progress=False)
        return found

    before, parts = now(), tiny.module.model
    for name in ("generation_head", "language_model"):
        original, other = getattr(parts, name), copy.deepcopy(getattr(parts, name))
        with torch.no_grad():
            for weight in other.parameters():
                weight.copy_(weight.flip(0))
        setattr(parts, name, other)
        changed = now()
        assert not torch.equal(changed, before)
        assert torch.equal(changed, codes(tiny, ids))
        setattr(parts, name, original)
        assert torch.equal(now(), before)


def test_modules_that_load_model_refuses(tiny: JanusUnifiedModel) -> None:
    from transformers import JanusConfig, JanusForConditionalGeneration, Qwen2Config

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = tiny.module.config
    config = JanusConfig(
        text_config=Qwen2Config(vocab_size=88, **sizes).to_dict(),
        vision_config=parts.vision_config.to_dict(),
        vq_config=parts.vq_config.to_dict(),
    )
    with pytest.raises(OspoError, match="has a 'qwen2' language model, expected 'llama'"):
        ImageGenerator(JanusForConditionalGeneration(config))
    official = nn.Linear(2, 2)
    official.config = type("Config", (), {"model_type": "multi_modality"})()  # type: ignore[assignment]
    with pytest.raises(OspoError, match="of DeepSeek's own classes"):
        ImageGenerator(official)
    with torch.device("meta"):
        empty = JanusForConditionalGeneration(parts)
    with pytest.raises(OspoError, match="is on the meta device, expected weights in memory"):
        ImageGenerator(empty)
    tiny.module.model.generation_head.vision_head.bias = nn.Parameter(torch.empty(0))
    with pytest.raises(OspoError, match=r"generation_head\.vision_head\.bias is sharded, expected whole weights"):
        ImageGenerator(tiny.module)


def test_other_objects_are_refused(tiny: JanusUnifiedModel) -> None:
    for model in (None, "shapes", tiny.module.model, tiny.decoder, nn.Linear(2, 2)):
        with pytest.raises(
            UsageError, match=rf"model: got {type(model).__name__}, expected what ospo_fast\.load_model"
        ):
            ImageGenerator(model)  # type: ignore[arg-type]
    for processor in (8, "processor", tiny.processor.tokenizer, tiny.processor.image_processor):
        with pytest.raises(UsageError, match=rf"processor: got {type(processor).__name__}, expected a JanusProcessor"):
            ImageGenerator(tiny.module, processor)
    with pytest.raises(UsageError, match="processor: got one with a JanusUnifiedModel, which has its own"):
        ImageGenerator(tiny, tiny.processor)
    tiny.module.generation_config.generation_kwargs = {"boi_token_id": 6}
    with pytest.raises(UsageError, match="processor: its boi_token has id 5, that of the model is 6"):
        ImageGenerator(tiny.module, tiny.processor)


@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id"])
def test_a_processor_with_other_special_ids_is_refused(tiny: JanusUnifiedModel, name: str) -> None:
    """transformers generates with those of the generation configuration."""
    setattr(tiny.module.generation_config, name, 7)
    with pytest.raises(UsageError, match=f"processor: its {name[:-3]} has id .*, that of the model is 7"):
        ImageGenerator(tiny.module, tiny.processor)


def test_a_refused_processor_leaves_the_configuration(tiny: JanusUnifiedModel) -> None:
    module = tiny.module
    del module.config.template_set
    processor = copy.copy(tiny.processor)
    processor.tokenizer = copy.deepcopy(tiny.processor.tokenizer)
    processor.tokenizer.pad_token = None
    with pytest.raises(OspoError, match="has no pad_token"):
        ImageGenerator(module, processor)
    assert not hasattr(module.config, "template_set")


@pytest.mark.parametrize("wrap", [list, lambda ids: ids.numpy()])
def test_ids_that_are_no_tensor_are_refused(tiny: JanusUnifiedModel, ids: list[torch.Tensor], wrap: Any) -> None:
    with pytest.raises(UsageError, match=r"prompts\[0\]: got \w+, expected a text or an int64 tensor"):
        codes(tiny.module, [wrap(ids[0]), ids[1]])


def test_a_module_without_a_generation_configuration_is_saved(tiny: JanusUnifiedModel, tmp_path: Any) -> None:
    tiny.module.generation_config = None
    tiny.save(tmp_path)
    assert (tmp_path / "generation_config.json").is_file()
