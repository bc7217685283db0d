"""The generation engine: images, texts, yes/no answers and likelihoods of captions, bitwise independent of the batch.

All are of a unified model.
"""

from ospo_fast.generation.chat_text import generate_chat_text
from ospo_fast.generation.exact import exact_hidden_states, exact_logprobs
from ospo_fast.generation.image_writer import ImageWriter
from ospo_fast.generation.images import GeneratedBatch, ImageGenerator
from ospo_fast.generation.requests import GenerationError
from ospo_fast.generation.text import generate_text
from ospo_fast.generation.throughput import Throughput
from ospo_fast.generation.vqa import answer_questions, caption_logprobs

__all__ = [
    "GeneratedBatch",
    "GenerationError",
    "ImageGenerator",
    "ImageWriter",
    "Throughput",
    "answer_questions",
    "caption_logprobs",
    "exact_hidden_states",
    "exact_logprobs",
    "generate_chat_text",
    "generate_text",
]
