"""Every arm on the same photographs, on one copy of the base."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mondrian_ft.errors import AdapterError, DataError
from mondrian_ft.evaluation.evaluator import Evaluator, Voice
from mondrian_ft.evaluation.outputs import Output
from mondrian_ft.model import lora
from mondrian_ft.model.features import FeatureStore


def evaluator(base: Any, **options: Any) -> Evaluator:
    return Evaluator(base, FeatureStore(base.backbone), **{"max_tokens": 8, **options})


def texts(outputs: dict[str, list]) -> dict[str, list[str]]:
    return {arm: [one.text for one in some] for arm, some in outputs.items()}


def test_the_base_arm_is_the_base_and_tuned_is_tuned(lab, base) -> None:
    """One copy of the model, both arms; the adapter is still in it afterwards."""
    examples = lab.examples(4)
    alone = texts(evaluator(base).run(examples, ["base"]))["base"]
    lab.attach(base)
    found = texts(evaluator(base).run(examples, ["base", "tuned"]))
    assert list(found) == ["base", "tuned", "tuned_shuffled"]
    assert found["base"] == alone
    assert found["tuned"] != alone
    assert lora.lora_layers(base.model)
    again = texts(evaluator(base, batch_size=3).run(examples, ["tuned", "base"]))
    assert again == found


def test_an_arm_answers_free_and_under_the_schema(lab, base) -> None:
    """The free answers are the same as without it; the shuffled control stays free."""
    from mondrian_ft.data.critique import strict_format_error
    from mondrian_ft.evaluation.constrain import Constraint, Lengths

    lab.attach(base)
    examples = lab.examples(3)
    constraint = Constraint.critique(base, ("Light",), lengths=Lengths(9, 9, 9, 9, 9, 1))
    free = texts(evaluator(base, max_tokens=300).run(examples, ["base", "tuned"]))
    one = evaluator(base, max_tokens=300, constraint=constraint)
    wanted = ["base", "base_constrained", "tuned", "tuned_constrained"]
    found = one.run(examples, wanted)
    assert list(found) == [*wanted, "tuned_shuffled"]
    both = texts(found)
    for arm, answers in free.items():
        assert both[arm] == answers
    for arm in ("base_constrained", "tuned_constrained"):
        assert all(strict_format_error(text, ("Light",)) is None for text in both[arm])
    assert both["base_constrained"] != both["tuned_constrained"]
    alone = texts(one.run(examples, ["tuned_constrained"]))
    assert alone == {"tuned_constrained": both["tuned_constrained"]}
    with pytest.raises(DataError, match="needs the schema"):
        evaluator(base).run(examples, ["base_constrained"])


def test_an_arm_that_cannot_answer_does_not_take_the_others_with_it(lab, base) -> None:
    """An adapter of another base in production once ended the evaluation of a good one."""

    def absent() -> Any:
        raise AdapterError("v3 was made for another base")

    lab.attach(base)
    examples = lab.examples(2)
    one = evaluator(base, voices={"production": Voice(absent, "abc")})
    found = one.run(examples, ["production", "base", "tuned"])
    assert list(found) == ["base", "tuned", "tuned_shuffled"]
    assert one.failed == {"production": "v3 was made for another base"}
    assert set(one.peak_memory) >= {"base", "tuned"}
    assert all(peak > 0 for peak in one.peak_memory.values())
    with pytest.raises(AdapterError, match="another base"):
        one.run(examples, ["production"])


def test_logits_that_are_not_finite_lose_one_arm(lab, base) -> None:
    """Damaged adapter: its answers are left out with the reason, and the base is still judged."""
    from mondrian_ft.model.backend import mx

    lab.attach(base)
    examples = lab.examples(2)
    layer = next(iter(lora.lora_layers(base.model).values()))
    layer["lora_b"] = mx.full(layer["lora_b"].shape, float("nan"))
    one = evaluator(base)
    found = one.run(examples, ["base", "tuned"])
    assert list(found) == ["base"]
    assert "not finite" in one.failed["tuned"]


def test_another_adapter_is_heard_on_the_same_base(lab, base, tmp_path) -> None:
    """In production is v1, tuned is another: each answers as it does alone, and v2 stays in."""
    from mondrian_ft.model import adapter as adapters

    examples = lab.examples(3)
    spec = lab.attach(base)
    saved = adapters.save(
        tmp_path / "v1", base, spec, pixels={}, prompts=[], data_lock="", facts={}
    )
    first = texts(evaluator(base).run(examples, ["tuned"]))["tuned"]
    for layer in lora.lora_layers(base.model).values():
        layer["lora_b"] = -2 * layer["lora_b"]
    second = texts(evaluator(base).run(examples, ["tuned"]))["tuned"]
    assert first != second
    production = Voice(lambda: adapters.applied(saved.folder, base), saved.hash)
    one = evaluator(base, voices={"production": production})
    found = texts(one.run(examples, ["production", "tuned"]))
    assert (found["production"], found["tuned"]) == (first, second)


def test_examples_in_the_prompt_must_leave_room(lab, base) -> None:
    """A prompt longer than the model can hold is an arm that fails, not answers made of noise."""
    from contextlib import nullcontext

    shown = Voice(nullcontext, None, lambda prompt: prompt + " and light" * base.backbone.longest)
    one = evaluator(base, voices={"base_examples": shown})
    assert list(one.run(lab.examples(1), ["base_examples", "base"])) == ["base"]
    assert "no room for an answer" in one.failed["base_examples"]


def with_own_prompts(examples: list[Any]) -> list[Any]:
    """Each row its own prompt, so that no two rows ask the same."""
    return [
        dataclasses.replace(one, row=dataclasses.replace(one.row, prompt=f"Judge it, {number}."))
        for number, one in enumerate(examples)
    ]


def shown(found: list, base: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Pictures that each arm's requests were given."""
    import mondrian_ft.evaluation.evaluator as module

    calls: list[Any] = []

    def answer(base: Any, requests: list, constraints: list, *, answered: Any, **_: Any) -> None:
        calls.append(requests)
        for number, request in enumerate(requests):
            answered(number, 0, Output("", len(request.tokens), 0, 0.0, True))

    monkeypatch.setattr(module, "generate_each", answer)
    evaluator(base).run(found, ["tuned"])
    return calls


def test_shuffled_keeps_the_prompt_and_changes_the_photograph(lab, base, monkeypatch) -> None:
    """The same prompts, each with another photograph, as many image tokens as that one has."""
    lab.attach(base)
    examples = with_own_prompts(lab.examples(5))
    plain, shuffled = shown(examples, base, monkeypatch)
    for number, (one, other) in enumerate(zip(plain, shuffled, strict=True)):
        assert other.features is not one.features
        following = examples[(number + 1) % 5]
        assert other.grid == following.pixels.grid
        count = list(other.tokens).count(base.backbone.image_token)
        assert count == following.pixels.tokens


def test_a_photograph_that_comes_twice_is_not_its_own_shuffle(lab, base, monkeypatch) -> None:
    """Two advisors on one photograph: the next row once gave the same photograph again."""
    lab.attach(base)
    a, b, c = lab.examples(3)
    twice = dataclasses.replace(a, row=dataclasses.replace(a.row, job_id="second"))
    plain, shuffled = shown(with_own_prompts([a, twice, b, c]), base, monkeypatch)
    assert all(
        one.features is not other.features for one, other in zip(plain, shuffled, strict=True)
    )


def test_one_photograph_cannot_be_shuffled(lab, base) -> None:
    """No such arm then, rather than one that says nothing."""
    lab.attach(base)
    (one,) = lab.examples(1)
    assert list(evaluator(base).run([one], ["tuned"])) == ["tuned"]
    assert list(evaluator(base).run([one, one], ["tuned"])) == ["tuned"]


def test_tuned_without_an_adapter_is_refused(lab, base) -> None:
    """It once was the base under another name."""
    with pytest.raises(AdapterError, match="the model has none"):
        evaluator(base).run(lab.examples(1), ["base", "tuned"])


def test_unknown_arms_and_no_rows_are_refused(lab, base) -> None:
    """A typo is no model."""
    with pytest.raises(DataError, match="there is no arm tunned"):
        evaluator(base).run(lab.examples(1), ["tunned"])
    with pytest.raises(DataError, match="no held-out photographs"):
        evaluator(base).run([], ["base"])


def test_the_limit_is_the_longest_reference_and_a_margin(lab, base) -> None:
    """No good answer is cut; and it is what decoding uses when nothing is set."""
    examples = lab.examples(4)
    longest = max(one.supervised for one in examples)
    assert Evaluator.limit(examples) == int(longest * 1.25) + 1
    found = evaluator(base, max_tokens=None).run(examples, ["base"])["base"]
    assert max(one.tokens for one in found) == Evaluator.limit(examples)


def test_progress_names_the_arm(lab, base) -> None:
    """For the line that says who is answering."""
    lab.attach(base)
    seen: list[tuple[str, int]] = []
    evaluator(base, batch_size=2).run(
        with_own_prompts(lab.examples(3)),
        ["base", "tuned"],
        lambda arm, done: seen.append((arm, done)),
    )
    assert seen == [(arm, done) for arm in ("base", "tuned", "tuned_shuffled") for done in (2, 3)]


def test_a_question_is_asked_once(lab, base, monkeypatch) -> None:
    """With one prompt for all, the shuffled control is what the model says of the others anyway."""
    lab.attach(base)
    examples = lab.examples(4)
    free = evaluator(base).run(with_own_prompts(examples), ["tuned"])
    found = evaluator(base).run(examples, ["tuned"])
    told = texts(found)
    assert told["tuned_shuffled"] == [*told["tuned"][1:], told["tuned"][0]]
    assert len(free["tuned_shuffled"]) == 4
    assert len(shown(examples, base, monkeypatch)) == 1
    assert len(shown([*examples, *examples], base, monkeypatch)[0]) == 4


IDENTITY = {"base": "b", "adapter": "one"}


def asked(base: Any, examples: list[Any], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Outputs of both arms, and how many questions were put to the model for them."""
    import mondrian_ft.evaluation.evaluator as module

    counts: list[int] = []
    plain = module.generate_each

    def counted(base: Any, requests: list, *arguments: Any, **more: Any) -> Any:
        counts.append(len(requests))
        return plain(base, requests, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, "generate_each", counted)
        found = evaluator(base, **options).run(examples, ["base", "tuned"])
    return found, sum(counts)


def test_a_repeated_evaluation_costs_nothing(lab, base, tmp_path, monkeypatch) -> None:
    """And another adapter, limit or batch size asks anew; the base only where it must."""
    lab.attach(base)
    examples = lab.examples(4)
    options: dict[str, Any] = {"cache": tmp_path, "identity": IDENTITY}
    found, count = asked(base, examples, monkeypatch, **options)
    assert count == 8
    again, count = asked(base, examples, monkeypatch, **options)
    assert (again, count) == (found, 0)
    other = {**options, "identity": {**IDENTITY, "adapter": "two"}}
    assert asked(base, examples, monkeypatch, **other)[1] == 4
    for change in ({"max_tokens": 7}, {"batch_size": 3}, {"identity": {"base": "c"}}):
        assert asked(base, examples, monkeypatch, **{**options, **change})[1] == 8
    # Answers that are drawn are not the model's only ones.
    assert asked(base, examples, monkeypatch, temperature=1.0, **options)[1] == 8


def test_a_stopped_evaluation_goes_on_where_it_was(lab, base, tmp_path, monkeypatch) -> None:
    """Stopped after two of five: the next one asks the other three, and ends the same."""
    lab.attach(base)
    examples = lab.examples(5)
    options: dict[str, Any] = {"cache": tmp_path, "identity": IDENTITY, "batch_size": 2}
    whole = texts(evaluator(base, batch_size=2).run(examples, ["base", "tuned"]))

    def stop(arm: str, done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluator(base, **options).run(examples, ["base", "tuned"], stop)
    found, count = asked(base, examples, monkeypatch, **options)
    assert count == 3 + 5
    assert texts(found) == whole


def test_a_cache_that_cannot_be_written_is_told(lab, base, tmp_path) -> None:
    """A full disk costs the next evaluation time and this one nothing; it is not passed over."""
    examples = lab.examples(2)
    (tmp_path / "cache").write_text("in the way")
    one = evaluator(base, cache=tmp_path / "cache", identity=IDENTITY)
    assert texts(one.run(examples, ["base"])) == texts(evaluator(base).run(examples, ["base"]))
    assert "cannot write" in one.problem
    other = evaluator(base, cache=tmp_path / "fine", identity=IDENTITY)
    other.run(examples, ["base"])
    assert other.problem == ""
