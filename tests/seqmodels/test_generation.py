"""Generation: sampling, batches of prompts of any length, streams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import generation
from seqmodels.generation import Sampling, decode, feed, generate, sample, start
from seqmodels.mixers import S4DConfig, S5Config
from seqmodels.models import BackboneConfig, LanguageModel, LanguageModelConfig

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
    np.testing.assert_allclose(stream.logits, whole.logits, atol=1e-5)
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
    np.testing.assert_allclose(stream.logits, again.logits, atol=1e-5)


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Sampling(temperature=-1.0), "temperature=-1.0 must not be negative"),
        (lambda: Sampling(top_k=0), "top_k=0 must be None or positive"),
        (lambda: Sampling(top_p=1.5), "top_p=1.5 must be None or in"),
        (lambda: generation.check_prompts([], 5), "prompts is empty"),
        (lambda: generation.check_prompts([[1], []], 5), r"prompts\[1\] is empty"),
        (lambda: generation.check_prompts([[1, 5]], 5), r"prompts\[0\] has ids from 1 to 5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
