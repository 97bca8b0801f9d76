"""The laws of training: loss, gradients, parity with PyTorch and peft, order, resumption, meshes.

`tests/training.py` runs the cases that need separate processes: kills, meshes of 8 devices, two hosts.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from tiny import dequantize, random_blocks, tiny_config

from codegemma.adapters.adapter import Adapter
from codegemma.config import ModelConfig
from codegemma.jax.compiler import compiler_options
from codegemma.jax.forward import LoraParams
from codegemma.native.xla import StoredMatrix
from codegemma.train import horizon, mesh
from codegemma.train import loss as losses
from codegemma.train.lora import adapter_of, new_lora
from codegemma.train.loss import BLOCK, cross_entropy
from codegemma.train.memory import activation_bytes
from codegemma.train.objective import Objective, flops_of
from codegemma.train.optimizer import optimizer, schedule
from codegemma.train.order import Microbatch, Order, Sample, microbatches
from codegemma.train.session import Session
from codegemma.train.settings import TrainingSettings

GOLDEN = np.load(Path(__file__).parent / "golden" / "train.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN.files} - {"versions"})


# ------------------------------------------------------------------------------------------------------ loss
def dense(h_MD, targets_M, table_VD, rows_RD, ids, cap, z):
    """(nats [M], hits [M], gradients of the nats' weighted sum) in float64 NumPy, from all logits at once."""
    table = table_VD.astype(np.float64)
    table[list(ids)] = rows_RD
    h, M = h_MD.astype(np.float64), len(h_MD)
    raw = h @ table.T
    logits = cap * np.tanh(raw / cap) if cap else raw
    lse = np.log(np.exp(logits).sum(-1))
    nats = lse - logits[np.arange(M), targets_M] + z * lse**2
    weights_M = np.arange(1.0, M + 1)
    slope = np.exp(logits - lse[:, None]) * (1 + 2 * z * lse)[:, None]
    slope[np.arange(M), targets_M] -= 1
    slope *= weights_M[:, None] * (1 - (logits / cap) ** 2 if cap else 1)
    table_gradient = slope.T @ h
    rows_gradient = table_gradient[list(ids)]
    table_gradient[list(ids)] = 0
    return nats, logits.argmax(-1) == targets_M, slope @ table, table_gradient, rows_gradient


@pytest.mark.parametrize(
    "V, ids, cap, z, chunk",
    [
        (1031, (), None, 0.0, 1 << 20),
        (1031, (7, 600, 1030), 5.0, 1e-2, 4096),
        (512, (3,), None, 1e-3, 4096),
        (515, (), 2.0, 0.0, 4096),
    ],
)
def test_loss_in_chunks_is_the_dense_loss(monkeypatch, V, ids, cap, z, chunk):
    """Loss, hits and all gradients; vocabularies that chunks of 512 do and do not fill; adapters' targets."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", chunk)
    rng = np.random.default_rng(V)
    M, D = 6, 24
    h, table, rows = (
        rng.normal(0, s, shape).astype(np.float32)
        for s, shape in ((1, (M, D)), (0.5, (V, D)), (0.5, (len(ids), D)))
    )
    targets = np.array([*ids, *rng.integers(0, V, M)][:M], np.int32)

    def weighted(h, table, rows):
        lora = LoraParams({"rows": rows}, 1.0, ids)
        loss = cross_entropy(h, targets, table, lora, cap=cap, z=z, train_table=True)
        return (loss.nats_M * jnp.arange(1.0, M + 1)).sum(), loss

    (_, loss), gradients = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))(h, table, rows)
    nats, right, *wanted = dense(h, targets, table, rows, ids, cap, z)
    # a logit errs by D roundoffs of its terms' size, and a sum over V columns by as much again
    error = (
        4
        * 2.0**-24
        * (D**0.5 * np.linalg.norm(h, axis=1).max() * np.linalg.norm(table, axis=1).max() + np.log(V) * 4)
    )
    assert np.abs(loss.nats_M - nats).max() < error * (1 + 2 * z * 10)
    assert (np.asarray(loss.is_top_M) == right).all()
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max(initial=0) < 4 * error * np.abs(theirs).max(initial=0) + error


def test_a_frozen_table_changes_no_other_gradient_and_blocks_without_targets_are_skipped():
    rng = np.random.default_rng(0)
    M, D, V, ids = 2 * BLOCK, 8, 530, (5, 9)
    h, table, rows = (jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for shape in ((M, D), (V, D), (2, D)))
    targets = jnp.asarray(rng.integers(0, V, M), jnp.int32)

    def total(h, rows, count, trained):
        loss = cross_entropy(
            h, targets, table, LoraParams({"rows": rows}, 1.0, ids), count=count, train_table=trained
        )
        return (loss.nats_M * (jnp.arange(M) < (M if count is None else count))).sum(), loss.nats_M

    gradient = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True), static_argnums=3)
    (total_loss, each), (h_all, rows_all) = gradient(h, rows, None, False)
    (_, _), (h_trained, rows_trained) = gradient(h, rows, None, True)
    assert np.array_equal(h_all, h_trained) and np.array_equal(rows_all, rows_trained)
    (part, nats), (h_part, _) = gradient(h, rows, jnp.int32(100), False)
    assert np.array_equal(nats[:BLOCK], each[:BLOCK]) and not np.asarray(nats[BLOCK:]).any()
    assert abs(float(part) - float(each[:100].sum())) < 1e-3
    assert np.array_equal(h_part[:100], h_all[:100]) and not np.asarray(h_part[100:]).any()


@pytest.mark.parametrize("V, M, cap", [(1031, 9, 30.0), (9001, 1100, None), (4096, 3, 2.0)])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_table_of_blocks_gives_the_loss_of_its_values(monkeypatch, kernels, V, M, cap):
    """By the kernels (whose chunks are 4,096 rows, for 1,024 targets at a time), and as on other devices."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(losses.xla, "has_kernels", lambda: kernels)
    rng, D, ids = np.random.default_rng(1), 64, (7, 1030)
    tensor = random_blocks("Q4_0", (V, D), 0.5)
    h, rows = (rng.normal(0, 1, shape).astype(np.float32) for shape in ((M, D), (2, D)))
    targets = np.array([7, 1030, *rng.integers(0, V, M - 2)], np.int32)

    def weighted(h, rows, table):
        loss = cross_entropy(h, targets, table, LoraParams({"rows": rows}, 1.0, ids), cap=cap)
        return (loss.nats_M * jnp.arange(1.0, M + 1)).sum(), loss

    (_, loss), gradients = jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))(
        h, rows, StoredMatrix.of(tensor)
    )
    wanted, right, h_wanted, _, rows_wanted = dense(h, targets, dequantize(tensor), rows, ids, cap, 0.0)
    error = 2.0**-18 * np.abs(h_wanted).max()  # logits of 20 and their exponentials err by some roundoffs
    assert np.abs(loss.nats_M - wanted).max() < error and (np.asarray(loss.is_top_M) == right).all()
    assert (
        np.abs(gradients[0] - h_wanted).max() < error
        and np.abs(gradients[1] - rows_wanted).max() < error * M**0.5
    )


@pytest.mark.parametrize("cap", [None, 5.0])
def test_kernels_take_a_sample_and_a_count_as_the_chunks_do(monkeypatch, cap):
    rng, (V, D, S), M, ids = np.random.default_rng(2), (9000, 64, 5000), 2 * BLOCK, (7, 600)
    table = StoredMatrix.of(random_blocks("Q8_0", (V, D), 0.5))
    h, rows = (jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for shape in ((M, D), (2, D)))
    targets = jnp.asarray([7, *rng.integers(0, V, M - 1)], jnp.int32)
    sample = Sample(
        jnp.asarray(rng.permutation(V)[:S], jnp.int32), jnp.asarray(rng.uniform(1, 9, S), jnp.float32)
    )

    def total(h, rows, count):
        loss = cross_entropy(
            h,
            targets,
            table,
            LoraParams({"rows": rows}, 1.0, ids),
            cap=cap,
            z=1e-3,
            count=count,
            sample=sample,
        )
        return jnp.where(jnp.arange(M) < count, loss.nats_M, 0).sum(), loss

    results = []
    for kernels in (True, False):
        monkeypatch.setattr(losses.xla, "has_kernels", lambda kernels=kernels: kernels)
        step = jax.jit(jax.value_and_grad(lambda *args: total(*args), (0, 1), has_aux=True))
        (_, loss), gradients = step(h, rows, jnp.int32(300))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, gradients)))
        results.append((loss.nats_M[:300], loss.is_top_M[:300], *gradients))
    for ours, theirs in zip(*results, strict=True):
        assert (
            np.abs(np.float32(ours) - np.float32(theirs)).max() <= 2.0**-17 * np.abs(np.float32(theirs)).max()
        )


def test_a_sample_of_the_vocabulary_gives_the_loss_on_average():
    rng, V, D, M, ids = np.random.default_rng(3), 4000, 16, 12, (7, 3990)
    h, table, rows = (
        jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32) for shape in ((M, D), (V, D), (2, D))
    )
    tokens = rng.zipf(1.3, (64, 32)).astype(np.int32) % V
    order = Order([[{"tokens": row} for row in tokens]], 320)
    targets = jnp.asarray([7, *tokens.reshape(-1)[: M - 1]], jnp.int32)

    @jax.jit
    def measure(h, rows, sample=None):
        def total(h, rows):
            nats = cross_entropy(
                h, targets, table, LoraParams({"rows": rows}, 1.0, ids), sample=sample
            ).nats_M
            return nats.sum(), nats

        return jax.value_and_grad(total, (0, 1), has_aux=True)(h, rows)

    (_, exact), (h_exact, rows_exact) = measure(h, rows)
    batch = Microbatch(*[None] * 4, targets[None], None)
    draw = order.sampler(1000, V)
    sample, again, other = draw(5, [batch]), draw(5, [batch]), draw(6, [batch])
    assert all(np.array_equal(a, b) for a, b in zip(sample, again, strict=True))
    assert not np.array_equal(sample[0], other[0])
    assert len(sample.tokens_U) == len(
        set(sample.tokens_U)
    ) == 1000 and sample.weights_U.sum() == pytest.approx(V)
    certain = set(sample.tokens_U[sample.weights_U == 1])
    assert certain >= set(np.asarray(targets)) | set(np.bincount(tokens.reshape(-1)).argsort()[-50:])
    many = [measure(h, rows, draw(step, [batch])) for step in range(300)]
    ratios = [np.exp(np.asarray(nats - exact, np.float64)) for (_, nats), _ in many]
    normaliser = np.array(ratios)  # estimated over exact
    assert (
        np.abs(normaliser.mean(0) - 1) < 5 * normaliser.std(0) / 300**0.5
    ).all() and 0.01 < normaliser.std(0).max() < 1
    for mean, wanted in (
        (np.mean([g[0] for _, g in many], 0), h_exact),
        (np.mean([g[1] for _, g in many], 0), rows_exact),
    ):
        assert np.abs(mean - wanted).max() < 0.1 * np.abs(wanted).max()
    (_, full), full_gradients = measure(h, rows, Sample(np.arange(V, dtype=np.int32), np.ones(V, np.float32)))
    assert np.allclose(full, exact, 0, 1e-5) and np.allclose(full_gradients[0], h_exact, 0, 1e-5)
    with pytest.raises(ValueError, match="frozen table"):
        cross_entropy(h, targets, table, train_table=True, sample=sample)
    with pytest.raises(ValueError, match="take more of the vocabulary"):
        order.sampler(20, V)(0, [Microbatch(*[None] * 4, jnp.arange(30)[None], None)])


@pytest.mark.parametrize("trained", [False, True])
def test_memory_is_a_chunk_of_logits(trained):
    """All logits of 2,048 targets would be 512 MB. Beside its inputs and results, the step needs a few chunks
    of 32 MB and a few arrays as large as the table or the hidden states."""
    V, D, M = 65_536, 32, 2048
    kinds = ((M, D), jnp.float32), ((V, D), jnp.float32), ((M,), jnp.int32)
    shapes = [jax.ShapeDtypeStruct(*kind) for kind in kinds]

    def total(h, table, targets):
        return cross_entropy(h, targets, table, train_table=trained).nats_M.sum()

    step = jax.jit(jax.grad(total, (0, 1) if trained else 0)).lower(*shapes).compile()
    temporary = step.memory_analysis().temp_size_in_bytes
    assert temporary < 6 * losses.CHUNK_BYTES + 4 * 4 * D * (V + 4 * M) < 4 * V * M


# ------------------------------------------------------------------------- parity with PyTorch and with peft
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_are_those_of_pytorch(case, tmp_path):
    """Losses and trained arrays err at most 8 times as much as PyTorch's own in float32."""
    about = json.loads(str(GOLDEN[f"{case}/about"]))
    config = ModelConfig(**about["config"])
    params = {
        name: jnp.asarray(value)
        for name, value in training.reference.random_params(config, about["seed"]).items()
    }
    stored = {
        name.removeprefix(f"{case}/start/"): jnp.asarray(GOLDEN[name])
        for name in GOLDEN.files
        if name.startswith(f"{case}/start/")
    }
    lora = about["lora"] and LoraParams(
        stored,
        about["lora"]["lora_alpha"] / about["lora"]["r"],
        tuple(about["lora"].get("trainable_token_indices", ())),
    )
    ids, marks = GOLDEN[f"{case}/ids"].astype(np.int32), GOLDEN[f"{case}/loss"]
    rows = [
        training.row(*pair)
        for pair in zip(ids.reshape(-1, ids.shape[-1]), marks.reshape(-1, ids.shape[-1]), strict=True)
    ]
    settings = TrainingSettings(
        **about["settings"] | {"betas": tuple(about["settings"]["betas"])},
        row_rate=1,
        micro_tokens=ids[0].size,
        save_every=1000,
    )
    order = training.InOrder([rows], ids[0].size)
    with Session(config, params if lora else None, lora or params, order, settings, tmp_path) as session:
        reports = list(session.train())
    ended, _ = training.result(tmp_path)
    error = 8 * float(GOLDEN[f"{case}/losses_error"])
    assert np.abs(np.array([report.loss for report in reports]) - GOLDEN[f"{case}/losses"]).max() < error
    wanted = {
        name.removeprefix(f"{case}/end/"): GOLDEN[name]
        for name in GOLDEN.files
        if name.startswith(f"{case}/end/")
    }
    assert ended.keys() == wanted.keys()
    for name, values in wanted.items():
        apart = np.sqrt(np.mean((ended[name] - values) ** 2))
        assert apart < 8 * GOLDEN[f"{case}/error/{name}"] + 2.0**-24 * np.abs(values).max(), name


def test_a_new_adapter_changes_nothing_and_becomes_an_adapter():
    config, params = training.tiny()
    lora = new_lora(params, 4, ids=(67, 69), alpha=8, seed=1, start_from=(1, 2))
    assert lora.scale == 2 and np.array_equal(lora.weights["rows"], params["embed"][jnp.array([1, 2])])
    assert all(not np.asarray(value).any() for name, value in lora.weights.items() if name.endswith(".b"))
    adapter = adapter_of(lora, "tiny", {"base": "x"})
    adapter.check(config)
    assert isinstance(adapter, Adapter) and (adapter.rank, adapter.alpha, sorted(adapter.rows)) == (
        4,
        8,
        [67, 69],
    )
    again = LoraParams.of(adapter)
    assert (again.scale, again.ids) == (lora.scale, lora.ids)
    jax.tree.map(np.testing.assert_array_equal, again.weights, lora.weights)


def test_rows_of_the_embedding_go_slower():
    config, params = training.tiny()
    lora = new_lora(params, 4, ids=(67,))
    rule = optimizer(settings := TrainingSettings(weight_decay=0.1, row_rate=0.125), lambda step: 1e-2)
    gradients = jax.tree.map(jnp.ones_like, lora)
    changes = rule.update(gradients, rule.init(lora), lora)[0].weights
    decay = settings.weight_decay * lora.weights["rows"]
    np.testing.assert_allclose(changes["rows"], -1e-2 * 0.125 * (1 + decay), rtol=1e-5)
    np.testing.assert_allclose(changes["layers.0.q.b"], -1e-2, rtol=1e-5)


def test_a_stop_token_of_weight_three_counts_as_three():
    config, params = training.tiny()
    lora, rng = new_lora(params, 4, ids=(7,)), np.random.default_rng(0)
    rows = [training.row(rng.integers(3, 12, 24), np.arange(24) > 8) for _ in range(2)]
    ends = [{**row, "loss": row["loss"] & (row["tokens"] == 7)} for row in rows]
    assert 0 < sum(row["loss"].sum() for row in ends) < sum(row["loss"].sum() for row in rows)

    def weighted(rows, weight):
        loss = Objective(config, TrainingSettings(stop_weight=weight), (7,)).loss
        (total, (nats_M, *_)), gradient = jax.value_and_grad(loss, has_aux=True)(
            lora, params, next(microbatches(rows, 2))
        )
        return total, gradient.weights, nats_M

    (total, gradient, nats_M), (plain, once, same_M), (extra, more, _) = (
        weighted(rows, 3.0),
        weighted(rows, 1.0),
        weighted(ends, 1.0),
    )
    assert float(total) == pytest.approx(float(plain + 2 * extra), rel=1e-5) and (nats_M == same_M).all()
    for name, value in gradient.items():
        np.testing.assert_allclose(value, once[name] + 2 * more[name], rtol=1e-4, atol=1e-5)


def nats_in_float64(config, weights, ids, rows, horizon=0.0):
    """The summed loss of the rows' targets, in float64 NumPy; each segment is a sequence of its own."""
    params = {**weights, "embed": weights["embed"].copy()}
    params["embed"][list(ids)] = params.pop("rows")
    head, total = params.pop("horizon", None), 0.0
    for row in rows:
        for segment in range(1, row["segments"].max() + 1):
            inside = row["segments"] == segment
            tokens, targets = row["tokens"][inside], np.flatnonzero(row["loss"][inside][1:]) + 1
            logits = training.reference.logits(config, params, tokens, trace=(trace := {}))
            lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
            total += (lse[targets - 1] - logits[targets - 1, tokens[targets]]).sum()
            if horizon:
                last = trace[f"layers.{config.layers - 1}.out_TD"]
                hidden = training.reference.rms_norm(last, params["final_norm"], config)
                predicted = 1 / (1 + np.exp(-(hidden @ head[:-1] + head[-1])))
                wanted = shares_by_hand(tokens)
                total += horizon * sum(abs(predicted[t - 1] - wanted[t]) for t in targets if t in wanted)
    return total


MIDDLES = horizon.Middles(68, (1, 67, 68, 69, 70))


def shares_by_hand(tokens):
    """{target: share of the middle that comes after the token before it} of one sequence."""
    wanted, inside = {}, None
    for t, token in enumerate(tokens):
        if inside is not None and token in MIDDLES.ends:
            for done, place in enumerate(inside, 1):
                wanted[place + 1] = (len(inside) - done) / len(inside)
            inside = None
        if inside is not None:
            inside.append(t)
        if token == MIDDLES.start:
            inside = []
    return wanted


def fim_row(rng):
    """Two segments and padding; in the first, two documents, the second with an empty middle."""
    size = rng.integers(1, 9)
    documents = [2, 67, 5, 69, 6, 68, *rng.integers(75, 520, size), 70, 69, 67, 9, 68, 70]
    second = [2, 69, 8, 67, 68, *rng.integers(75, 520, 3), 1]
    tokens = np.array([*documents, *second, *[0] * (32 - len(documents) - len(second))])
    segments = np.repeat([1, 2, 0], [len(documents), len(second), 32 - len(documents) - len(second)])
    loss = np.isin(np.arange(32), [t for t in range(1, 32) if tokens[t] >= 70 or tokens[t] == 1])
    return training.row(tokens, loss, segments.astype(np.int32))


def test_shares_of_packed_rows_are_those_of_separate_ones():
    rng = np.random.default_rng(0)
    rows = [fim_row(rng) for _ in range(6)]
    (batch,) = microbatches(rows, 6, 2, 16, MIDDLES)
    made = 0
    for part in range(2):
        for index, share in zip(batch.index_CM[part], batch.shares_CM[part], strict=True):
            r, t = divmod(int(index), 32)
            row = rows[3 * part + r]
            start = int(np.argmax(row["segments"] == row["segments"][t]))
            wanted = shares_by_hand(row["tokens"][row["segments"] == row["segments"][t]])
            if share >= 0:
                made += 1
                assert share == np.float32(wanted[t + 1 - start])
    # each token of a middle has a share, and the row's last two middles have none and three
    assert made == sum(int((row["tokens"] >= 75).sum()) for row in rows) > 20
    assert next(microbatches(rows, 6)).shares_CM is None


def with_head(layers, head):
    return replace(layers, weights=layers.weights | {"horizon": jnp.asarray(head, jnp.float32)})


def test_the_horizon_is_a_second_loss_and_nothing_without_weight():
    """The nats of targets are the same bits with it; with weight 0 the loss is their sum, and no more."""
    config, params = training.tiny()
    base, layers = training.layers(params, (67, 69))
    rng = np.random.default_rng(1)
    (batch,) = microbatches([fim_row(rng), fim_row(rng)], 2, block=BLOCK, middles=MIDDLES)
    headed = with_head(layers, rng.normal(0, 0.1, 33))
    plain = jax.jit(Objective(config, TrainingSettings()).loss)
    second = jax.jit(Objective(config, TrainingSettings(horizon=0.5)).loss)
    (total, losses), (both, with_shares) = plain(layers, base, batch), second(headed, base, batch)
    assert np.array_equal(losses.nats_M, with_shares.nats_M) and losses.share_errors_M is None
    assert float(total) == float(plain(layers, base, batch._replace(shares_CM=None))[0])
    errors = np.asarray(with_shares.share_errors_M)
    assert errors.sum() > 0 and not errors[(batch.shares_CM < 0).reshape(-1)].any()
    assert float(both) == pytest.approx(float(total) + 0.5 * errors.sum(), rel=1e-6)


def test_gradients_of_the_horizon_are_finite_differences_in_float64():
    config = tiny_config("gemma3", layers=2, width=32, head_width=16, ffn_width=48, vocab=520)
    weights, ids, rng = training.reference.random_params(config, 0), (67, 69), np.random.default_rng(2)
    rows = [fim_row(rng) for _ in range(2)]
    base, layers = training.layers({name: jnp.asarray(value) for name, value in weights.items()}, ids)
    layers = with_head(layers, rng.normal(0, 0.1, 33))
    objective = Objective(config, TrainingSettings(precision="float32", horizon=20.0))
    (batch,) = microbatches(rows, 2, block=BLOCK, middles=MIDDLES)
    exactly = partial(nats_in_float64, config, ids=ids, rows=rows, horizon=20.0)
    training.check_gradient(
        objective, layers, base, batch, weights, exactly, ("horizon", "layers.1.v", "rows")
    )


def test_the_head_learns_where_a_middle_ends_and_is_dropped(tmp_path):
    config, params = training.tiny()
    tokens = np.array([2, 67, 5, 69, 6, 68, *range(100, 116), 70, *[0] * 9])
    rows = [training.row(tokens, tokens >= 70, (tokens > 0).astype(np.int32))] * 40
    settings = TrainingSettings(1e-2, row_rate=1, steps=30, horizon=0.1, decay="constant", micro_tokens=32)
    session = Session(
        config,
        params,
        new_lora(params, 4, (67,)),
        Order([rows], 32),
        settings,
        tmp_path,
        stop_ids=MIDDLES.ends,
        fim_middle=68,
    )
    with session:
        reports = list(session.train())
    assert reports[0].horizon == pytest.approx(np.abs(np.arange(16) / 16 - 0.5).mean())
    assert reports[-1].horizon < 0.5 * reports[0].horizon
    adapter = adapter_of(session.state.trainable, "tiny", {})
    assert "horizon" in session.state.weights and "horizon" not in {*adapter.a, *adapter.b}
    with pytest.raises(ValueError, match="no token before one: leave horizon out"):
        Session(config, params, new_lora(params, 4), Order([rows], 32), settings, tmp_path / "other")


@pytest.mark.parametrize("kind", ["gemma-mqa", "gemma2", "gemma3"])
def test_gradients_of_layers_are_finite_differences_in_float64(kind):
    """Of packed rows, along a random direction for each parameter: so packed is also as separate."""
    config = tiny_config(kind, layers=2, width=32, head_width=16, ffn_width=48, vocab=520)
    weights, ids, rng = training.reference.random_params(config, 0), (67, 69), np.random.default_rng(1)
    rows = [training.packed_row(rng) for _ in range(2)]
    rows[0]["tokens"][3:5] = ids
    base, layers = training.layers({name: jnp.asarray(value) for name, value in weights.items()}, ids)
    objective = Objective(config, TrainingSettings(precision="float32"))
    (batch,) = microbatches(rows, 2, block=BLOCK)
    names = sorted(weights.keys() - {"embed"} | {"rows"})
    exactly = partial(nats_in_float64, config, ids=ids, rows=rows)
    training.check_gradient(objective, layers, base, batch, weights, exactly, names)


def test_packed_layers_have_the_gradient_of_separate_rows():
    config, params = training.tiny()
    base, layers = training.layers(params, (67,))
    row, objective = training.packed_row(np.random.default_rng(3)), Objective(config, TrainingSettings())
    parts = []
    for segment in (1, 2):
        inside = row["segments"] == segment
        alone = training.row(
            *(np.pad(row[key][inside], (0, 32 - inside.sum())) for key in ("tokens", "loss"))
        )
        parts.append({**alone, "segments": (np.arange(32) < inside.sum()).astype(np.int32)})
    packed, separate = (
        jax.jit(objective.gradient)(layers, base, next(microbatches(rows, len(rows), block=BLOCK)))
        for rows in ([row], parts)
    )
    assert float(packed[0][0]) == pytest.approx(float(separate[0][0]), rel=2.0**-18)
    for name, slope in packed[1].weights.items():
        apart = np.linalg.norm(slope - separate[1].weights[name])
        assert apart < 2**8 * 2.0**-24 * np.linalg.norm(slope) + 1e-30, name


def in_blocks(layers):
    config = tiny_config(
        "gemma3", layers=layers, global_every=2, width=64, head_width=32, ffn_width=256, vocab=520
    )
    return config, {
        name: StoredMatrix.of(random_blocks("Q8_0", value.shape, 0.2))
        if value.ndim == 2
        else jnp.asarray(value)
        for name, value in training.reference.random_params(config, 0).items()
    }


@pytest.mark.parametrize("precision, rounded", [("float32", 0), ("bfloat16", 1)])
def test_a_step_is_computed_in_its_precision_forward_and_backward(precision, rounded):
    config, params = in_blocks(2)
    batch = next(microbatches([training.row(np.arange(24) % 9 + 3, np.arange(24) > 8)], 1))
    lowered = (
        jax.jit(Objective(config, TrainingSettings(precision=precision)).gradient)
        .lower(new_lora(params, 4), params, batch)
        .as_text()
    )
    products = {
        name: [line for line in lowered.splitlines() if f"@codegemma_{name}(" in line]
        for name in ("adapted", "adapted_back", "attention", "attention_back", "vocabulary_softmax")
    }
    assert all(
        lines and all(f"bfloat16 = {rounded} : i32" in line for line in lines) for lines in products.values()
    ), products


def test_remat_saves_memory_and_computes_no_kept_product_again():
    config, params = in_blocks(8)
    lora = new_lora(params, 4)
    rng = np.random.default_rng(0)
    rows = [training.row(rng.integers(3, 520, 256), np.arange(256) > 200) for _ in range(4)]
    batch = next(microbatches(rows, 4))
    held, calls = {}, {}
    for remat in ("none", "products", "layer"):
        compiled = (
            jax.jit(
                jax.grad(Objective(config, TrainingSettings(remat=remat)).loss, has_aux=True),
                compiler_options=compiler_options(remat),
            )
            .lower(lora, params, batch)
            .compile()
        )
        held[remat], calls[remat] = (
            compiled.memory_analysis().temp_size_in_bytes,
            compiled.as_text().count("custom-call("),
        )
    assert held["layer"] < 0.5 * held["products"] < 0.4 * held["none"]
    stated = activation_bytes(config, TrainingSettings(micro_tokens=1024), 256)
    assert 0.5 * stated < held["none"] < 2 * stated
    assert calls["none"] == calls["products"] < calls["layer"]


def test_schedule_and_flops_are_as_stated():
    rate = schedule(TrainingSettings(learning_rate=2.0, warmup=0.2, floor=0.25), 20)
    assert [float(rate(i)) for i in (0, 3, 4, 12, 20)] == pytest.approx([0.5, 2.0, 2.0, 1.25, 0.5])
    config, params = training.tiny()
    weights = sum(
        int(np.prod(shape))
        for name, shape in training.reference.shapes(config).items()
        if name.startswith("layers") and len(shape) == 2
    )
    attention = sum(
        6 * config.heads * config.head_width * min(100, config.layer_window(i) or 100)
        for i in range(config.layers)
    )
    _, layers = training.layers(params, (67,))
    for trained, base, head in ((new_lora(params, 4), 4, 4), (params, 6, 8), (layers, 6, 4)):
        assert (
            flops_of(config, 300, 100, 40, trained)
            == 300 * (base * weights + attention) + 40 * head * config.vocab * config.width
        )


# ----------------------------------------------------------------------------------------------------- order
def numbered(count, length=4):
    return [training.row(np.full(length, i), np.ones(length, bool)) for i in range(count)]


def test_order_is_a_pure_function_of_seed_and_step():
    """Each epoch reads every row once, folders follow one another, and the order of calls changes nothing."""
    order = Order([numbered(10), numbered(6, 8)], 8, seed=3, epochs=2)
    taken = [[int(row["tokens"][0]) for row in order.rows(step)] for step in range(order.steps)]
    assert order.steps == 10 + 12 and [len(rows) for rows in taken] == [2] * 10 + [1] * 12
    first = sum(taken[:10], [])
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10)) and first[:10] != first[10:]
    assert sorted(sum(taken[10:16], [])) == list(range(6))
    again = Order([numbered(10), numbered(6, 8)], 8, seed=3, epochs=2)
    assert [[int(row["tokens"][0]) for row in again.rows(step)] for step in reversed(range(22))] == taken[
        ::-1
    ]
    assert [int(row["tokens"][0]) for row in replace(order, seed=4).rows(0)] != taken[0]
    assert Order([numbered(10)], 8, epochs=0.5).steps == 2
    with pytest.raises(IndexError):
        order.rows(22)
    with pytest.raises(ValueError, match="do not fill one step of 5 rows"):
        Order([numbered(4)], 20)


def test_microbatches_hold_every_target_once():
    """In any size and parts, each marked token but a segment's first is the target of the state before it."""
    rng = np.random.default_rng(0)
    rows = [training.packed_row(rng) for _ in range(7)]
    wanted = sorted(
        (r, t, int(row["tokens"][t]))
        for r, row in enumerate(rows)
        for t in range(1, 32)
        if row["loss"][t] and row["segments"][t] == row["segments"][t - 1]
    )
    for size, parts, block in ((7, 1, 1), (2, 2, 16), (4, 4, 1), (8, 2, 256)):
        targets = []
        for number, batch in enumerate(microbatches(rows, size, parts, block)):
            assert batch.index_CM.shape[1] % block == 0 and len(batch.tokens_BT) == size
            for part, count in enumerate(batch.count_C):
                pairs = zip(batch.index_CM[part, :count], batch.targets_CM[part, :count], strict=True)
                for index, target in pairs:
                    row, t = divmod(int(index), 32)
                    targets.append((number * size + part * (size // parts) + row, t + 1, int(target)))
        assert sorted(targets) == wanted


# -------------------------------------------------------------------------- microbatches, resumption, meshes
def steps(folder, **options):
    """Final weights and losses of a run of `tests/training.py` in this process."""
    return training.run(folder, training.Job(**options))


def near(ours, theirs, roundoffs=2**10):
    """After three steps, losses and weights differ by no more than another order of the sums explains.

    Adam divides by the gradient's size, so an error relative to a tensor's gradient is one relative to the
    learning rate.
    """
    assert np.abs(np.subtract(ours[1], theirs[1])).max() < roundoffs * 2.0**-24 * max(theirs[1])
    for name, values in theirs[0].items():
        apart = np.sqrt(np.mean((ours[0][name] - values) ** 2))
        assert apart < roundoffs * 2.0**-24 * (np.sqrt(np.mean(values**2)) + training.RATE), (name, apart)


@pytest.fixture(scope="module")
def unsplit(tmp_path_factory):
    return {kind: steps(tmp_path_factory.mktemp(kind), kind=kind) for kind in ("full", "lora", "layers")}


@pytest.mark.parametrize("kind", ["full", "layers"])
def test_the_microbatch_does_not_change_the_step(unsplit, tmp_path, kind):
    near(steps(tmp_path, kind=kind, micro_tokens=64), unsplit[kind])


def test_a_folder_is_not_overwritten_and_other_settings_do_not_resume(tmp_path):
    steps(tmp_path, kind="lora")
    with pytest.raises(ValueError, match="holds a training run"):
        steps(tmp_path, kind="lora")
    with pytest.raises(ValueError, match=r"holds a run with other options \(seed 0, not 5\): resume it"):
        steps(tmp_path, kind="lora", resume=True, seed=5)


def test_patience_ends_a_run_for_good(tmp_path):
    """At a rate of nearly 0, no evaluation is better than the first: the run ends, and stays ended."""
    options = {"kind": "lora", "steps": 12, "patience": 2, "learning_rate": 1e-30, "held_out": True}
    _, first = steps(tmp_path, **options)
    assert len(first) == 3  # the first is the best, two more are not better
    assert steps(tmp_path, **options, resume=True)[1] == first


def child(folder, devices=1, **options):
    """A process that trains; its result lies in the folder when it ends."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, training.__file__, str(folder), json.dumps(options)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finished(process):
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return out


def test_kernels_take_the_same_steps_as_jax_alone(unsplit, tmp_path):
    """Three steps of an adapter on packed rows; in bfloat16, with nearly the same losses."""
    near(steps(tmp_path / "a", kind="qlora"), unsplit["lora"])
    _, rounded = steps(tmp_path / "b", kind="qlora", precision="bfloat16")
    assert np.abs(np.subtract(rounded, unsplit["lora"][1])).max() < 0.01


def test_kernels_train_layers_as_jax_alone(unsplit, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(losses.xla, "has_kernels", lambda: False)
        alone = steps(tmp_path / "a", kind="layers")
    near(unsplit["layers"], alone)
    _, rounded = steps(tmp_path / "b", kind="layers", precision="bfloat16")
    assert np.abs(np.subtract(rounded, alone[1])).max() < 0.01


def test_the_result_is_the_mean_of_the_last_checkpoints(tmp_path):
    """Those of steps 2, 4 and 5; a run that was stopped after step 3 and resumed has the same mean."""
    options = {"kind": "layers", "steps": 5, "average": 3}
    steps(tmp_path / "cut", **options, stop=3)
    at_2, _ = training.result(tmp_path / "cut", 2)
    steps(tmp_path / "cut", **options, resume=True)
    steps(tmp_path / "whole", **options)
    kept = [at_2, *(training.result(tmp_path / "cut", step)[0] for step in (4, 5))]
    ours, other = (np.load(tmp_path / name / "result.npz") for name in ("cut", "whole"))
    assert ours.files == other.files == list(at_2)
    for name in ours.files:
        mean = np.mean([weights[name] for weights in kept], 0, np.float64)
        assert np.array_equal(ours[name], other[name])
        assert np.abs(ours[name] - mean).max() < 4 * 2.0**-24 * np.abs(mean).max(), name
    with pytest.raises(ValueError, match="needs 3 older checkpoints, but 2 are kept: raise keep"):
        TrainingSettings(average=4)


@pytest.mark.parametrize("kind", ["full", "qlora", "layers"])
def test_killed_at_any_moment_and_resumed_nothing_differs(tmp_path, kind):
    """kill -9 before the first checkpoint, while one is being written, and after one.

    Weights, moments and metrics are those of the run that was not stopped, bit for bit.
    """
    uninterrupted, cut = tmp_path / "uninterrupted", tmp_path / "cut"
    steps(uninterrupted, kind=kind, steps=6, held_out=True)
    for moment, hold in (("step 1", 0), ("write 4", 4), ("step 5", 0), (None, 0)):
        process = child(cut, kind=kind, steps=6, held_out=True, resume=True, announce=True, hold=hold)
        if moment:
            assert any(line.strip() == moment for line in process.stdout), process.stderr.read()[-3000:]
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == (-signal.SIGKILL if moment else 0), errors[-3000:]
        assert "4" not in checkpoints(cut) or not hold
    ours, theirs = training.state(cut), training.state(uninterrupted)
    assert ours.keys() == theirs.keys() and any("mu" in name for name in ours)
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    assert training.metrics(cut) == training.metrics(uninterrupted) and len(training.metrics(cut)) == 6
    assert checkpoints(cut) == checkpoints(uninterrupted) == ["4", "6"]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


MESHES = ("fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2")


def test_meshes_of_eight_devices_do_not_change_the_step(unsplit, tmp_path):
    """Full and LoRA on each mesh, in one process.

    Parameters and moments are really divided, and a checkpoint of one mesh is resumed on another.
    """
    divided = json.loads(finished(child(tmp_path, devices=8, meshes=MESHES)).splitlines()[-1])
    for places in MESHES:
        near(training.result(tmp_path / f"full {places}"), unsplit["full"])
        parts = 4 if "data" in places else 8
        assert divided[places] == {"embed": parts, "q": parts, "moment of down": parts, "norm": 1}
    near(training.result(tmp_path / f"lora {MESHES[-1]}"), unsplit["lora"])
    near(training.result(tmp_path / "moved"), unsplit["full"])


def test_two_hosts_do_not_change_the_step(unsplit, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    hosts = [child(tmp_path, mesh="fsdp=2", host=[f"127.0.0.1:{port}", 2, i]) for i in range(2)]
    for host in hosts:
        finished(host)
    near(training.result(tmp_path), unsplit["full"])


@pytest.mark.parametrize("text", ["fsdp", "fsdp=0", "rows=2", "fsdp=1,,tensor=1", "fsdp=3", "fsdp=2,fsdp=1"])
def test_invalid_meshes_are_refused(text):
    with pytest.raises(ValueError, match="mesh"):
        mesh.make(text)
    assert mesh.make(None) is None
