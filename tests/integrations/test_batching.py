"""Requests in a running batch get what each gets alone."""

import pytest
import torch

from path_attention.integrations import generate_batch
from path_attention.ops.history.state import PAGE
from tests.models.test_modeling import ids, model


def alone(m: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    x = torch.tensor([prompt])
    return m.generate(x, max_new_tokens=count, do_sample=False, use_cache=False)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("shared", [0, 130])
@pytest.mark.parametrize("mixer", ["path", "path_fox"])
def test_each_request_gets_what_it_gets_alone(mixer: str, shared: int) -> None:
    """More requests than slots, so that they enter and leave in between; with a beginning in common and without."""
    m = model(mixer)
    x = ids(6, 100).tolist()
    beginning = ids(1, 200)[0, :shared].tolist()
    prompts = [beginning + row[:length] for row, length in zip(x, (3, 100, 1, 64, 17, 90), strict=True)]
    expected = [alone(m, prompt, 12) for prompt in prompts]
    # A token that ends some requests early.
    stop = expected[1][5]
    found: list[list[int]] = [[] for _ in prompts]
    ended = set()
    for new in generate_batch(m, prompts, max_new_tokens=12, slots=2, eos_token_id=stop):
        assert new.request not in ended
        found[new.request].append(new.token)
        if new.is_last:
            ended.add(new.request)
    assert ended == set(range(6))
    assert found == [row[: row.index(stop) + 1] if stop in row else row for row in expected]


def test_a_common_beginning_is_held_once() -> None:
    m = model("path")
    prompts = [[*ids(1, 600)[0].tolist(), n] for n in range(1, 9)]
    from path_attention.integrations.batching import _Active, _Batch

    batch = _Batch(m, 8, prompts[0][:600])
    with torch.no_grad():
        batch.enter({n: _Active(n, prompts[n][600:], 1) for n in range(8)})
    tables = batch.layers[0].path.state.pages
    pages = 600 // PAGE  # all but what is open
    assert all(torch.equal(row, tables[0, :pages]) for row in tables[:, :pages])
    assert int(tables[0, :pages].min()) >= 0


def test_sampling_is_repeatable() -> None:
    m, prompts = model("path"), ids(3, 20).tolist()
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(5)
        runs.append(list(generate_batch(m, prompts, max_new_tokens=5, temperature=2.0, generator=generator)))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompts": []}, "prompts: got"),
        ({"prompts": [[1], []]}, "prompts: got"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"slots": 0}, "slots: got 0"),
        ({"temperature": -1.0}, "temperature: got -1"),
    ],
)
def test_bad_requests_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_batch(model(), **{"prompts": [[1]], "max_new_tokens": 1, **arguments})
    with pytest.raises(ValueError, match="model: got mixer 'rope'"):
        generate_batch(model("rope"), [[1]], max_new_tokens=1)
