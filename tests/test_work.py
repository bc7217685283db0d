"""What stages count while they run, and the sums of it."""

from typing import Any

import pytest
import torch

from ospo_fast import load_model
from ospo_fast.cards import CARDS, find_card
from ospo_fast.cost import ModelShapes, causal
from ospo_fast.errors import OspoError
from ospo_fast.generation import ImageGenerator, answer_questions, generate_text
from ospo_fast.pipeline import check_stage_row, sum_stage_rows
from ospo_fast.stages.teacher_forcing import hidden_states, teacher_forced
from ospo_fast.work import Work, count, counting, describe, device_name, rates, step_rates, work_of

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("shapes", device="cpu")


@pytest.fixture
def work(model: Any) -> Work:
    return work_of(model)


def test_work_counts_inside_its_block_only() -> None:
    outer, inner = Work(), Work()
    count(tokens=5)
    with counting(outer):
        count(tokens=1, kept=2)
        with counting(inner):
            count(tokens=3, dropped=1, attended=9.0)
    assert (outer.tokens, outer.kept, outer.dropped) == (4, 2, 1)
    assert (inner.tokens, inner.kept, inner.dropped) == (3, 0, 1)
    assert outer.cost(1.0, "cpu")["flops"] is None  # no shapes


@pytest.mark.parametrize("branches", [1, 2])
def test_images_count_every_row(model: Any, work: Work, branches: int) -> None:
    prompts = ("a red circle", "a blue circle", "two blue squares and a red circle")
    ids = [model.image_prompt(prompt) for prompt in prompts]
    with counting(work):
        ImageGenerator(model).generate(ids, seeds=range(3), output="codes", progress=False, guidance_scale=branches)
    lengths = [len(row) for row in ids] + [len(row) for row in ids[1:] if branches == 2]  # unconditional ones: once
    assert work.tokens == sum(lengths) + branches * 3 * 35  # the last code is not read
    assert work.images == 3
    attended = sum(map(causal, lengths)) + branches * sum(causal(35, before=len(row)) for row in ids)
    sizes: ModelShapes = work_of(model).shapes  # type: ignore[assignment]
    flops = sizes.flops(tokens=work.tokens, attended=attended, codes=branches * 3 * 36, decoded=3)
    assert work.flops == pytest.approx(flops)


def test_texts_count_prompts_and_answers(model: Any, work: Work) -> None:
    ids = model.chat([{"role": "user", "content": "questions: a red circle"}])
    with counting(work):
        generate_text(model, [ids] * 3, seeds=range(3), max_new_tokens=2, progress=False)
    assert work.tokens == 3 * (len(ids) + 1)


def test_answers_count_an_image_once_for_all_its_questions(model: Any, work: Work) -> None:
    image = model.decode_codes(torch.zeros(1, 36, dtype=torch.long))[0]
    questions = ["is there a red circle?", "is there a blue circle?"]
    chats = {q: model.chat([{"role": "user", "content": q}], image=True) for q in questions}
    with counting(work):
        answer_questions(model, [image], [questions], template=chats.__getitem__, progress=False)
    ids = chats[questions[0]].tolist()
    prefix = len(ids) - ids[::-1].index(model.image_id)
    assert work.tokens == prefix + 2 * (len(ids) - prefix)


def test_a_backward_pass_counts_when_there_is_one(model: Any) -> None:
    """And it counts the gradients of the decoder's weights where these are trained."""
    codes = torch.zeros(2, 36, dtype=torch.long)
    batch = teacher_forced(model, [model.image_prompt("a red circle")] * 2, codes)
    works = [work_of(model) for _ in range(4)]
    passes = ((False, False, None), (True, False, None), (True, True, None), (False, False, 2))
    for work, (grad, trained, layers) in zip(works, passes, strict=True):
        model.decoder.requires_grad_(trained)
        with counting(work), torch.set_grad_enabled(grad):
            hidden_states(model, batch.embeds, layers=layers)
    forward, both, full, early = (work.flops for work in works)
    assert 2.9 * forward < full <= 3 * forward
    assert works[0].tokens == batch.embeds.shape[0] * batch.embeds.shape[1]
    assert 2 * forward < both < 3 * forward
    assert early == pytest.approx(forward * 2 / 5)


def test_rates_and_mfu() -> None:
    work = Work(tokens=1000, images=4, flops=989e12)
    assert rates(work.cost(2.0, H100), 2.0) == {"tokens_s": 500.0, "images_s": 2.0, "mfu": None}
    work.shapes = ModelShapes.from_config({})
    assert rates(work.cost(2.0, H100), 2.0)["mfu"] == 0.5
    assert step_rates(work.cost(2.0, H100), 2.0) == {"tokens_s": 500.0, "mfu": 0.5}
    assert step_rates(work.cost(2.0, "cpu"), 2.0) == {"tokens_s": 500.0}
    assert rates(work.cost(0.0, H100), 0.0) == {"mfu": None}
    work.kept, work.dropped = 3, 1
    assert describe(work.cost(2.0, H100), 2.0) == "500 tokens/s, MFU 50.0%, 2.0 GPU-seconds, 3 kept, 1 dropped"
    assert describe(Work().cost(2.0, "cpu"), 2.0) == ""


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (H100, "h100"), ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA A100-PCIE-40GB", "a100-40"), ("NVIDIA L4", "l4"), ("NVIDIA L40S", "l40s"), ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("cpu", None), ("NVIDIA GH200 480GB", None),
    ],
)  # fmt: skip
def test_cards_are_found_by_the_name_that_torch_gives_them(device: str, name: str | None) -> None:
    card = find_card(device)
    assert (card and card.name) == name
    assert all(find_card(card.name) is card for card in CARDS)


def row(seconds: float, **values: Any) -> dict[str, Any]:
    work = Work(ModelShapes.from_config({}), tokens=100, images=1, flops=989e10, kept=2)
    cost = work.cost(seconds, H100)
    return {"stage": "images", "seconds": seconds, "items": 2, "peak_mb": 1.0, "cost": cost, **values}


def test_workers_of_one_call_run_at_the_same_time() -> None:
    """Wall time is that of the longest worker, whose rows follow each other. Device seconds are those of all."""
    rows = [row(1.0)]
    rows += [row(s, call="a", workers=2, worker=w, iteration=1) for s, w in ((4.0, 0), (2.0, 1), (3.0, 1))]
    rows += [row(10.0, call="a", workers=2, worker=0, iteration=2)]
    found = sum_stage_rows([check_stage_row(entry, "x") for entry in rows])["images"]
    assert found["seconds"] == 1 + 5 + 10
    assert found["device_seconds"] == 1 + 4 + 2 + 3 + 10
    assert (found["items"], found["kept"], found["tokens"]) == (10, 10, 500)
    assert found["tokens_s"] == pytest.approx(500 / 16, rel=1e-3)
    assert found["mfu"] == pytest.approx(5 * 989e10 / (20 * 989e12), rel=1e-2)


def test_rows_of_older_versions_have_no_cost() -> None:
    old = {"stage": "images", "seconds": 1.0, "items": 2, "peak_mb": 1.0}
    found = sum_stage_rows([old, row(2.0)])["images"]
    assert found == {"seconds": 3.0, "items": 4, "failed": 0, "peak_mb": 1.0}
    unknown = row(2.0)
    unknown["cost"]["flops"] = None
    assert sum_stage_rows([row(1.0), unknown])["images"]["mfu"] is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cost": 3}, "`cost` should be an object"),
        ({"cost": {"device": 1}}, "`cost` should be an object with the name of a `device`"),
        ({"cost": {"device": "cpu"}}, "`cost.device_seconds` should be a number"),
        ({"cost": row(1.0)["cost"] | {"tokens": -1}}, "`cost.tokens` should be a number of at least 0, got -1"),
        ({"cost": row(1.0)["cost"] | {"kept": True}}, "`cost.kept` should be"),
        ({"cost": row(1.0)["cost"] | {"peak_flops": "x"}}, "`cost.peak_flops` should be"),
        ({"call": ["x"]}, "`call` should be a text"),
        ({"worker": 1.5}, "`worker` should be an integer"),
        ({"workers": "2"}, "`workers` should be an integer"),
        ({"iteration": [1]}, "`iteration` should be an integer"),
    ],
)
def test_wrong_costs_and_workers_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(OspoError, match=f"entry 1: {words}"):
        check_stage_row({**row(1.0), **values}, "entry 1")


def test_devices_without_a_name_have_that_of_their_type():
    import torch

    assert [device_name(torch.device(name)) for name in ("cpu", "mps")] == ["cpu", "mps"]
