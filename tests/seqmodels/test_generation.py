"""Generation: sampling, batches of prompts of any length, streams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.generation import Sampling, decode, feed, generate, sample, start
from seqmodels.mixers import S4DConfig, S5Config
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig
from tests import tolerances

VOCABULARY = 11
GREEDY = Sampling(temperature=0.0)
PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]


@functools.cache
def model_and_variables():
    stack = BackboneConfig(
        layout=("s5", "s4d"), mixers=(S5Config(state_size=8), S4DConfig(state_size=4)), width=6
    )
    model = LanguageModel(LanguageModelConfig(stack, VOCABULARY, embedding_std=1.0))
    return model, jax.jit(model.init)(jax.random.key(1), np.ones((1, 3), np.int32))


@functools.cache
def whole_logits():
    model, variables = model_and_variables()
    return jax.jit(lambda tokens: model.apply(variables, tokens)[0])


def continued(prompt, count):
    """Greedy tokens by the whole text at every step; padded, for one compilation."""
    text = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(text)] = text
        text.append(int(np.argmax(whole_logits()(padded)[0, len(text) - 1])))
    return text[len(prompt) :]


@pytest.mark.always("512")
@pytest.mark.parametrize("chunk", [2, 512])
def test_greedy_equals_the_whole_text_at_every_step(chunk):
    new = generate(*model_and_variables(), PROMPTS, max_new_tokens=6, sampling=GREEDY, chunk=chunk)
    assert new == [continued(prompt, 6) for prompt in PROMPTS]


def test_a_row_ends_with_its_stop_token_and_others_go_on():
    free = [continued(prompt, 6) for prompt in PROMPTS]
    stop = free[0][1]
    sampling = Sampling(temperature=0.0, stop_tokens=(stop,))
    new = generate(*model_and_variables(), PROMPTS, max_new_tokens=6, sampling=sampling)
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert new == expected
    assert len(new[0]) <= 2


def test_a_stream_fed_in_chunks_equals_one_fed_at_once():
    model, variables = model_and_variables()
    tokens = np.arange(12).reshape(2, 6) % VOCABULARY
    whole = feed(model, variables, start(model, 2), tokens)
    stream = start(model, 2)
    for at in (0, 3):
        stream = feed(model, variables, stream, tokens[:, at : at + 3])
    np.testing.assert_allclose(stream.logits, whole.logits, **tolerances.EACH_FLOAT32_OUTPUT)
    ids = np.array([[1, 1, 0], [0, 0, 0]])
    before = np.asarray(stream.logits)
    padded = feed(model, variables, stream, tokens[:, :3], ids)
    np.testing.assert_array_equal(padded.logits[1], before[1])
    assert not np.array_equal(padded.logits[0], before[0])


def test_the_stream_after_decoding_has_seen_the_new_tokens():
    model, variables = model_and_variables()
    prompt = np.array([[1, 2, 3]])
    stream = feed(model, variables, start(model, 1), prompt)
    tokens, lengths, stream = decode(
        model, variables, stream, jax.random.key(0), max_new_tokens=4, sampling=GREEDY
    )
    assert lengths.tolist() == [4]
    text = np.concatenate([prompt, tokens], axis=1)
    again = feed(model, variables, start(model, 1), text)
    np.testing.assert_allclose(stream.logits, again.logits, **tolerances.EACH_FLOAT32_OUTPUT)


def test_many_suffixes_go_on_from_one_prefix_that_was_read_once():
    """All at once, as rows; and one after the other, from a copy in the host's memory."""
    model, variables = model_and_variables()
    prefix, suffixes = np.array([[3, 1, 4]]), np.array([[1, 5], [9, 2], [6, 5]])
    expected = whole_logits()(np.concatenate([np.repeat(prefix, 3, axis=0), suffixes], axis=1))
    snapshot = jax.device_get(feed(model, variables, start(model, 1), prefix))
    rows = jax.tree.map(lambda part: jnp.repeat(part, 3, axis=0), snapshot)
    together = feed(model, variables, rows, suffixes).logits
    apart = [feed(model, variables, snapshot, suffix[None]).logits[0] for suffix in suffixes]
    for found in (together, np.stack(apart)):
        np.testing.assert_allclose(found, expected[:, -1], **tolerances.EACH_FLOAT32_OUTPUT)


def draws(logits, sampling, count=400):
    keys = jax.random.split(jax.random.key(0), count)
    rows = jnp.asarray(logits, jnp.float32)[None]
    return np.asarray(jax.jit(jax.vmap(lambda k: sample(rows, k, sampling)[0]))(keys))


def test_sampling_keeps_the_likely_tokens():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert set(draws(logits, Sampling())) == {0, 1, 2, 3}
    assert set(draws(logits, Sampling(top_k=2))) == {0, 1}
    assert set(draws(logits, Sampling(top_p=0.6))) == {0, 1}
    assert set(draws(logits, Sampling(top_p=0.4))) == {0}
    assert set(draws(logits, GREEDY)) == {0}
    hot, cold = (np.mean(draws(logits, Sampling(temperature=t)) == 0) for t in (5.0, 0.5))
    assert hot < 0.5 < cold


def test_the_seed_decides():
    run = functools.partial(generate, *model_and_variables(), PROMPTS, max_new_tokens=6)
    assert run(seed=1) == run(seed=1)
    assert run(seed=1) != run(seed=2)


def continuations(prompts=PROMPTS, **more):
    return generate(
        *model_and_variables(), prompts, **{"max_new_tokens": 6, "sampling": GREEDY} | more
    )


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, np.ndarray.tolist])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_of_tokenizers(kind, side):
    tokens, mask = (np.full((3, 7), fill) for fill in (99, 0))
    for row, prompt in enumerate(PROMPTS):
        part = slice(7 - len(prompt), 7) if side == "left" else slice(len(prompt))
        tokens[row, part], mask[row, part] = prompt, 1
    assert continuations(kind(tokens), attention_mask=kind(mask)) == continuations()


def test_arrays_as_prompts_and_lists_as_stops():
    prompts = np.array([[1, 2, 3], [4, 5, 6]], np.int64)
    expected = continuations(prompts.tolist())
    assert continuations(prompts) == continuations(jnp.asarray(prompts)) == expected
    free = continuations()
    stopped = [
        continuations(sampling=Sampling(temperature=0.0, stop_tokens=stops))
        for stops in ([free[0][1]], (free[0][1],), np.array([free[0][1]]))
    ]
    assert stopped[0] == stopped[1] == stopped[2] != free


def test_scalars_of_jax_and_numpy_are_plain_numbers():
    plain = Sampling(temperature=0.5, top_k=3, top_p=0.75, stop_tokens=(1, 2))
    for kind in (np.asarray, jnp.asarray):
        values = {"temperature": 0.5, "top_k": 3, "top_p": 0.75, "stop_tokens": [1, 2]}
        sampling = Sampling(**{name: kind(value) for name, value in values.items()})
        assert sampling == plain
        assert hash(sampling) == hash(plain)


def fed(tokens, ids=None):
    model, variables = model_and_variables()
    ids = ids if ids is None or isinstance(ids, jax.Array) else np.array(ids)
    return feed(model, variables, start(model, 1), np.asarray(tokens), ids)


def decoded(**changes):
    model, variables = model_and_variables()
    options = {"max_new_tokens": 6, "sampling": GREEDY, "key": jax.random.key(0)} | changes
    return decode(model, variables, start(model, 1), options.pop("key"), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Sampling(temperature=-1.0), "temperature=-1.0 must be 0"),
        (lambda: Sampling(temperature=1e-30), "temperature=1e-30 must be 0"),
        (lambda: Sampling(temperature=float("nan")), "temperature=nan must be a concrete, finite"),
        (lambda: Sampling(temperature=float("inf")), "temperature=inf must be a concrete, finite"),
        (lambda: Sampling(top_k=0), "top_k=0 must be an integer from 1"),
        (lambda: Sampling(top_k=np.float32(2)), "top_k=.*2.0.* must be an integer"),
        (lambda: Sampling(top_p=1.5), "top_p=1.5 must be None or in"),
        (lambda: Sampling(top_p=float("nan")), "top_p=nan must be"),
        (lambda: Sampling(stop_tokens=np.array(3)), r"stop_tokens=array\(3\) must have one axis"),
        (lambda: Sampling(stop_tokens=(-1,)), r"stop_tokens\[0\]=-1 must be an integer"),
        (lambda: continuations([]), "prompts is empty"),
        (lambda: continuations([[1], []]), r"prompts\[1\] is empty"),
        (lambda: continuations([[1, 11]]), r"prompts\[0\] has ids from 1 to 11"),
        (lambda: continuations([[1.7]]), r"prompts\[0\]=\[1.7\] must be a list of integers"),
        (
            lambda: continuations([[1, 2, 3]], attention_mask=[[1, 0, 1]]),
            r"attention_mask\[0\] has padding among the real tokens",
        ),
        (
            lambda: continuations(sampling=Sampling(stop_tokens=(2, 11))),
            r"stop_tokens\[1\]=11 is outside the vocabulary, whose ids are from 0 to 10",
        ),
        (lambda: continuations(max_new_tokens=0), "max_new_tokens=0 must be an integer from 1"),
        (lambda: continuations(max_new_tokens=2**31 - 1), "max_new_tokens=2147483647 must be"),
        (lambda: continuations(seed=-1), "seed=-1 must be an integer from 0 to 4294967295"),
        (lambda: continuations(seed=10**20 - 1), "seed=99999999999999999999 must be an integer"),
        (lambda: continuations(chunk=0), "chunk=0 must be an integer from 1"),
        (lambda: continuations(dtype="int8"), "dtype='int8' must be a floating-point dtype"),
        (lambda: start(model_and_variables()[0], 0), "batch_size=0 must be an integer from 1"),
        (lambda: start(model_and_variables()[0], 1, max_length=0), "max_length=0 must be"),
        (lambda: fed([[1, 11]]), "tokens has ids from 1 to 11"),
        (lambda: fed([[-1]]), "tokens has ids from -1 to -1"),
        (lambda: fed([[1.5]]), "dtype float64; give integer ids"),
        (lambda: fed([[1], [2]]), "tokens have 2 rows, the stream has 1"),
        (lambda: fed([[1, 2]], [[0, 1]]), "may stand only at the end of a row"),
        (lambda: fed([[1, 2]], jnp.array([[0, 1]])), "may stand only at the end of a row"),
        (lambda: fed([[1, 2]], [[1, 2]]), "one document a row here"),
        (lambda: fed([[1, 2]], [[1]]), r"segment_ids have shape \(1, 1\), tokens have \(1, 2\)"),
        (lambda: decoded(max_new_tokens=0), "max_new_tokens=0 must be an integer from 1"),
        (lambda: decoded(key=jnp.zeros(2)), "key=Array.* must be a key"),
        (lambda: decoded(sampling=Sampling(stop_tokens=[11])), "outside the vocabulary"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
