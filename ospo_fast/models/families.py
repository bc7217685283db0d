"""The families of unified models: their classes in transformers, and their adapters. Light to import."""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ospo_fast.errors import OspoError

if TYPE_CHECKING:
    from ospo_fast.models.adapter import Adapter


_HALF = re.compile(r"emu3[-_.]?(gen|chat)", re.IGNORECASE)


@dataclass(frozen=True)
class Family:
    """A family of checkpoints."""

    model_type: str  # in config.json
    model_class: str  # in transformers, or "module:class"
    processor_class: str
    adapter: str  # module and class, see `ospo_fast.models.base`
    since: str  # the oldest version of transformers that has them in the form that the adapter reads
    text_types: tuple[str, ...] = ()  # accepted model_type of text_config
    sections: tuple[str, ...] = ()  # keys of config.json that hold objects
    chats: bool = True  # False: its checkpoints only generate images
    pixels_apart: bool = False  # a trained copy has not the parts of the folder of its base model that make pixels
    other_tensors: str | None = None  # an expression for the names of those that `Adapter.load_rest` loads

    @property
    def is_own(self) -> bool:
        """Whether its class is of this package, which then has also written the files."""
        return ":" in self.model_class

    def adapter_class(self) -> Any:
        """Import the class of its adapter, and with it torch."""
        module, _, name = self.adapter.partition(":")
        return getattr(importlib.import_module(module), name)

    def adapt(self, module: Any, processor: Any, *, name: str, image_size: tuple[int, int] | None = None) -> Adapter:
        """Return the adapter of a module and its processor."""
        adapter: Adapter = self.adapter_class()(module, processor, name=name, image_size=image_size)
        if image_size is not None:
            module.config.generated_size = list(image_size)  # save_pretrained writes this entry
        return adapter

    def chats_as(self, config: dict[str, Any], name: str) -> bool:
        """Return whether a checkpoint of this family chats, as far as its config.json and its name say."""
        return self.chats and not (self.model_type == "emu3" and find_half(config, name) == "gen")

    def transformers_class(self, name: str) -> Any:
        """Return a class of transformers, or of "module:class". Raises OspoError if transformers does not have it."""
        import transformers

        module, _, own = name.rpartition(":")
        found = getattr(importlib.import_module(module) if module else transformers, own, None)
        if found is None:
            raise OspoError(
                f"model: {self.model_type!r} models need {name} of transformers, which {transformers.__version__} does "
                f'not have; install "transformers>={self.since}"'
            )
        return found

    def build_empty(self, config: dict[str, Any]) -> Any:
        """Build the module of a configuration without memory for its weights."""
        import torch

        model_class = self.transformers_class(self.model_class)
        with torch.device("meta"):
            return model_class(model_class.config_class(**config))


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "janus",
            "JanusForConditionalGeneration",
            "JanusProcessor",
            "ospo_fast.models.janus:JanusUnifiedModel",
            since="5.17",
            text_types=("llama",),
            sections=("text_config", "vision_config", "vq_config"),
        ),
        Family(
            "emu3",
            "Emu3ForConditionalGeneration",
            "Emu3Processor",
            "ospo_fast.models.emu3:Emu3UnifiedModel",
            since="5.17",
            text_types=("emu3_text_model",),
            sections=("text_config", "vq_config", "vocabulary_map"),
        ),
        Family(
            "emu3_5",
            "ospo_fast.models.emu3_5:Emu35ForCausalLM",
            "Emu3Processor",
            "ospo_fast.models.emu3_5:Emu35UnifiedModel",
            since="5.17",
            sections=("vq_config", "vocabulary_map"),
            chats=False,
        ),
        Family(
            "chameleon",
            "ChameleonForConditionalGeneration",
            "ChameleonProcessor",
            "ospo_fast.models.chameleon:ChameleonUnifiedModel",
            since="5.17",
            sections=("vq_config", "vocabulary_map"),
            other_tensors=r"model\.vqmodel\.decoder\.",
        ),
        Family(
            "glm_image",
            "GlmImageForConditionalGeneration",
            "GlmImageProcessor",
            "ospo_fast.models.glm_image:GlmImageUnifiedModel",
            since="5.17",
            text_types=("glm_image_text",),
            sections=("text_config", "vision_config", "vq_config"),
            chats=False,
            pixels_apart=True,
        ),
    )
}


def find_half(config: dict[str, Any], name: str) -> str | None:
    """Return "gen" or "chat" for a checkpoint of Emu3, whose halves differ in weights alone; None if not known."""
    half = config.get("emu3_half")
    if half in ("gen", "chat"):
        return str(half)
    found = _HALF.findall(os.path.realpath(name) if os.path.exists(name) else name)  # noqa: PTH110 (for long names)
    return str(found[-1]).lower() if found else None


def find_family(config: dict[str, Any], name: str) -> Family:
    """Return the family of a config.json in transformers' layout. Raises OspoError for another kind of model."""
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        known = ", ".join(map(repr, FAMILIES))
        remedy = "use a model of these"
        if kind == "Emu3":  # with code of its own
            remedy = "use the repository with -hf at its end; an Emu3.5 is converted, as a downloaded folder"
        raise OspoError(f"model: {name} has model_type {kind!r:.60}, expected one of {known}; {remedy}")
    return family
