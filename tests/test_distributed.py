"""DTensor, tensor parallel, FSDP2, DDP, context parallel and checkpoints, in 2 and 4 processes,
beside one process.

The checks of a world share its processes, since those take seconds to import torch; each is then a
test of its own.
"""

import contextlib
import datetime
import itertools
import textwrap

import programs
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import GEMMA, LLAMA, assert_forward, ops, random, random_weight, same_bits
from torch import nn

from rmsnorm_cuda import (
    RMSNorm,
    fused_add_rms_norm,
    fused_add_rms_norm_,
    fused_add_rms_norm_quant,
    rms_norm,
    rms_norm_add,
    rms_norm_add_rms_norm,
    rms_norm_add_rms_norm_,
    rms_norm_gated,
    rms_norm_gated_quant,
    rms_norm_quant,
    rms_norm_rope,
    rms_norm_rope_,
)

pytestmark = pytest.mark.distributed
FP32, BF16 = torch.float32, torch.bfloat16
CHECKS = {2: [], 4: []}


def check(*worlds):
    def add(function):
        for world in worlds:
            CHECKS[world].append(function)
        return function

    return add


def _process(rank, world, folder):
    torch.set_num_threads(1)
    # A process that waits for one that has failed gives up, too.
    store, timeout = f"file://{folder}/store", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    for function in CHECKS[world]:
        torch.manual_seed(0)
        function(rank, world, folder)
        (folder / f"{function.__name__}.{rank}").touch()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """processes(world): the folder where each process noted the checks that it passed, and what
    went wrong.
    """
    done = {}

    def run(world):
        if world not in done:
            folder, error = tmp_path_factory.mktemp(f"world{world}"), ""
            try:
                mp.spawn(_process, (world, folder), nprocs=world)
            except (mp.ProcessRaisedException, mp.ProcessExitedException) as failure:
                error = str(failure)
            done[world] = folder, error
        return done[world]

    return run


def everywhere(t, mesh, *placements):
    """A copy of t, which every process has in full, as a DTensor. (Placed without sending
    anything.)
    """
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.clone(), mesh, placements, src_data_rank=None)


def mesh_of(*sizes):
    return dist.init_device_mesh("cpu", sizes)


def full(t):
    """The whole of a DTensor. Bytes are sent as they are: gloo adds and concatenates no fp8."""
    from torch.distributed.tensor import DTensor

    if t.dtype.itemsize > 1 or t.dtype == torch.int8:
        return t.full_tensor()
    return (
        DTensor.from_local(
            t.to_local().view(torch.uint8),
            t.device_mesh,
            t.placements,
            shape=t.shape,
            stride=t.stride(),
        )
        .full_tensor()
        .view(t.dtype)
    )


class no_communication:
    def __enter__(self):
        from torch.distributed.tensor.debug import CommDebugMode

        self.mode = CommDebugMode()
        self.mode.__enter__()

    def __exit__(self, *error):
        self.mode.__exit__(*error)
        assert error[0] or not self.mode.get_total_counts(), self.mode.get_comm_counts()


def layouts(world):
    """(mesh, placements of rows) of a tensor (5, 7, N). 5 and 7 are not divided evenly; of 4
    processes one has none of 5.
    """
    from torch.distributed.tensor import Replicate, Shard

    for placement in (Replicate(), Shard(0), Shard(1)):
        yield mesh_of(world), (placement,)
    if world == 4:
        for pair in itertools.product((Replicate(), Shard(0), Shard(1)), repeat=2):
            if pair != (Shard(0), Shard(0)):  # more shards than rows
                yield mesh_of(2, 2), pair


def summed(placements):
    from torch.distributed.tensor import Partial, Replicate

    return tuple(p if p.is_replicate() else Partial() for p in placements), (Replicate(),) * len(
        placements
    )


@check(2, 4)
def forward_and_backward(rank, world, folder):
    """Nothing is sent, and what belongs to the rows is placed as they are. The bits of one process,
    but of the weight's gradient, whose sum over the processes is formed in another order: some eps
    of the sum of magnitudes."""
    cases = itertools.product(((FP32, FP32), (BF16, FP32), (BF16, None)), ({}, GEMMA, LLAMA))
    for (dtype, weight_dtype), options in cases:
        x, weight = random(5, 7, 32, dtype=dtype).requires_grad_(), random_weight(32, weight_dtype)
        leaves = [x] if weight is None else [x, weight.requires_grad_()]
        y = rms_norm(x, 32, weight, 1e-6, **options)
        dy = random(5, 7, 32, dtype=y.dtype)
        want = torch.autograd.grad(y, leaves, dy)
        for mesh, rows in layouts(world):
            partial, whole = summed(rows)
            dx = everywhere(x.detach(), mesh, *rows).requires_grad_()
            dw = (
                None
                if weight is None
                else everywhere(weight.detach(), mesh, *whole).requires_grad_()
            )
            upstream = everywhere(dy, mesh, *rows)
            with no_communication():
                got_y = rms_norm(dx, 32, dw, 1e-6, **options)
                got = torch.autograd.grad(got_y, [dx] if weight is None else [dx, dw], upstream)
                with torch.no_grad():
                    plain, rstd = ops.rms_norm_forward(dx, [32], dw, 1e-6, **options)
            assert (
                got_y.placements == got[0].placements == plain.placements == rstd.placements == rows
            )
            assert (
                same_bits(full(got_y), y)
                and same_bits(full(plain), y)
                and same_bits(full(got[0]), want[0])
            )
            assert same_bits(
                full(rstd), ops.rms_norm_forward(x, [32], weight, 1e-6, **options)[1].detach()
            )
            if weight is not None:
                assert got[1].placements == partial and got[1].dtype == weight.dtype
                torch.testing.assert_close(full(got[1]), want[1], rtol=1e-5, atol=1e-5)


@check(2, 4)
def fused(rank, world, folder):
    for (dtype, wide), options in itertools.product(
        ((FP32, FP32), (BF16, BF16), (BF16, FP32)), ({}, LLAMA, {"round_sum": False})
    ):
        leaves = [
            random(5, 7, 32, dtype=dtype),
            random(5, 7, 32, dtype=wide),
            random_weight(32, dtype),
        ]
        plain = [t.clone().requires_grad_() for t in leaves]
        results = fused_add_rms_norm(*plain, 1e-6, **options)
        upstream = [random(5, 7, 32, dtype=t.dtype) for t in results]
        want = torch.autograd.grad(results, plain, upstream)
        for mesh, rows in layouts(world):
            partial, whole = summed(rows)
            there = [
                everywhere(t, mesh, *p).requires_grad_()
                for t, p in zip(leaves, (rows, rows, whole))
            ]
            with no_communication():
                got = fused_add_rms_norm(*there, 1e-6, **options)
                grads = torch.autograd.grad(
                    got, there, [everywhere(t, mesh, *rows) for t in upstream]
                )
            assert {t.placements for t in (*got, *grads[:2])} == {rows} and grads[
                2
            ].placements == partial
            assert all(
                same_bits(full(a), b)
                for a, b in zip((*got, *grads[:2]), (*results, *want[:2]), strict=True)
            )
            torch.testing.assert_close(
                full(grads[2]),
                want[2],
                rtol=torch.finfo(dtype).eps * 10,
                atol=1e-5 if dtype == FP32 else 0.1,
            )
            if options:
                continue
            with torch.no_grad(), no_communication():
                fused_add_rms_norm_(*there, 1e-6)
            assert same_bits(full(there[0]), results[0]) and same_bits(full(there[1]), results[1])
            assert there[0].placements == there[1].placements == rows


@check(2, 4)
@torch.no_grad()
def quantized(rank, world, folder):
    x, residual, weight = (
        random(5, 7, 128, dtype=BF16),
        random(5, 7, 128, dtype=BF16),
        random_weight(128, FP32),
    )
    variants = [
        {"dtype": torch.float8_e4m3fn},
        {"dtype": torch.int8, "return_norm": True},
        {"dtype": torch.float8_e5m2, "block": 64},
        {"dtype": torch.float8_e4m3fn, "block": 64, "column_major": True, "return_norm": True},
        {"dtype": torch.int8, "scale": torch.tensor(0.02)},
    ]
    for options, (mesh, rows) in itertools.product(variants, layouts(world)):
        w = everywhere(weight, mesh, *summed(rows)[1])
        dx, dr = everywhere(x, mesh, *rows), everywhere(residual, mesh, *rows)
        with no_communication():
            got = (
                rms_norm_quant(dx, w, 1e-6, **options),
                fused_add_rms_norm_quant(dx, dr, w, 1e-6, **options),
            )
        want = (
            rms_norm_quant(x, weight, 1e-6, **options),
            fused_add_rms_norm_quant(x, residual, weight, 1e-6, **options),
        )
        for a, b in zip(got, want, strict=True):
            for i, (t, value) in enumerate(zip(a, b, strict=True)):
                if i == 1 and "scale" in options:
                    assert t is options["scale"]
                    continue
                assert t.placements == rows and same_bits(full(t).float(), value.float()), (
                    i,
                    options,
                    rows,
                )
        if "column_major" in options:
            local = got[0][1].to_local()
            assert local.movedim(-1, 0).is_contiguous()


@check(2, 4)
def other_placements(rank, world, folder):
    """Sharded in the row, or not summed up yet: redistributed first, by one collective."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = mesh_of(world)
    x, weight = random(4, 8, 32).requires_grad_(), random_weight(32, FP32).requires_grad_()
    y = rms_norm(x, 32, weight, 1e-6)
    upstream = random(4, 8, 32)
    want = torch.autograd.grad(y, (x, weight), upstream)
    for placement, weight_placement in itertools.product(
        (Shard(2), Partial()), (Replicate(), Shard(0))
    ):
        if placement == Partial():  # a sum that is exact
            there = DTensor.from_local(x.detach() * (1.0 if rank == 0 else 0.0), mesh, [placement])
        else:
            there = everywhere(x.detach(), mesh, placement)
        leaves = [
            there.requires_grad_(),
            everywhere(weight.detach(), mesh, weight_placement).requires_grad_(),
        ]
        with CommDebugMode() as mode:
            got = rms_norm(leaves[0], 32, leaves[1], 1e-6)
        assert mode.get_total_counts() == 1 + (weight_placement == Shard(0))
        assert got.placements[0] not in (Shard(2), Partial()) and same_bits(full(got), y.detach())
        for dy_placement in (Shard(2), Shard(0), Replicate()):
            grads = torch.autograd.grad(
                got, leaves, everywhere(upstream, mesh, dy_placement), retain_graph=True
            )
            assert same_bits(full(grads[0]), want[0])
            torch.testing.assert_close(full(grads[1]), want[1], rtol=1e-5, atol=1e-5)
    # Several normalized dimensions: none of them may be sharded.
    there = everywhere(x.detach(), mesh, Shard(1))
    assert same_bits(full(rms_norm(there, (8, 32))), rms_norm(x, (8, 32)).detach())
    # More processes than rows.
    few = random(world - 1, 32)
    assert same_bits(full(rms_norm(everywhere(few, mesh, Shard(0)), 32)), rms_norm(few, 32))


@check(2, 4)
def gradient_of_the_sum_placed_otherwise(rank, world, folder):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    leaves, upstream = (
        [random(4, 8, 32), random(4, 8, 32), random_weight(32, FP32)],
        [random(4, 8, 32), random(4, 8, 32)],
    )
    plain = [t.clone().requires_grad_() for t in leaves]
    want = torch.autograd.grad(fused_add_rms_norm(*plain), plain, upstream)
    S0, S1, R = Shard(0), Shard(1), Replicate()
    for rows, others in (
        ((S1,), ((R,), (S0,), (Shard(2),), (Partial(),))),
        ((S0, S1), ((S1, S0), (R, S1), (Partial(), S1))),
    ):
        if len(rows) == 2 and world == 2:
            continue
        mesh = mesh_of(world) if len(rows) == 1 else mesh_of(2, 2)
        for placements in others:
            there = [
                everywhere(t, mesh, *p).requires_grad_()
                for t, p in zip(leaves, (rows, rows, (R,) * len(rows)))
            ]
            dsum = everywhere(upstream[1], mesh, *(R if p.is_partial() else p for p in placements))
            if Partial() in placements:
                mine = 1.0 if mesh.get_local_rank(0) == 0 else 0.0
                dsum = DTensor.from_local(dsum.to_local() * mine, mesh, placements)
            grads = torch.autograd.grad(
                fused_add_rms_norm(*there), there, [everywhere(upstream[0], mesh, *rows), dsum]
            )
            assert all(same_bits(full(a), b) for a, b in zip(grads[:2], want[:2])), placements
            torch.testing.assert_close(full(grads[2]), want[2], rtol=1e-5, atol=1e-5)


@check(2)
def sandwich(rank, world, folder):
    """Rows may be sharded; both weights are whole."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = mesh_of(world)
    x, residual, dy, dsum = (random(4, 6, 16) for _ in range(4))
    weights = random_weight(16, FP32), random_weight(16, FP32)
    plain = [t.clone().requires_grad_() for t in (x, residual, *weights)]
    want = rms_norm_add_rms_norm(*plain, 1e-6, scale=0.5)
    wanted = torch.autograd.grad(want, plain, (dy, dsum))
    of_add = torch.autograd.grad(rms_norm_add(*plain[:3], 1e-6), plain[:3], dy)
    for rows in (Replicate(), Shard(0), Shard(1)):
        placements = rows, rows, Replicate(), Replicate()
        leaves = [
            everywhere(t, mesh, p).requires_grad_()
            for t, p in zip((x, residual, *weights), placements)
        ]
        upstream = everywhere(dy, mesh, rows), everywhere(dsum, mesh, rows)
        with no_communication():
            got = rms_norm_add_rms_norm(*leaves, 1e-6, scale=0.5)
            total = rms_norm_add(*leaves[:3], 1e-6)
        assert all(a.placements == (rows,) for a in (*got, total))
        assert all(same_bits(full(a), b.detach()) for a, b in zip(got, want))
        assert same_bits(full(total), rms_norm_add(x, residual, weights[0], 1e-6))
        grads = torch.autograd.grad(got, leaves, upstream)
        assert all(same_bits(full(a), b) for a, b in zip(grads[:2], wanted))
        for a, b in zip(grads[2:], wanted[2:]):
            torch.testing.assert_close(full(a), b, rtol=1e-5, atol=1e-5)
        for a, b in zip(torch.autograd.grad(total, leaves[:3], upstream[0]), of_add):
            torch.testing.assert_close(full(a), b, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            there = [everywhere(t, mesh, p) for t, p in zip((x, residual, *weights), placements)]
            rms_norm_add_rms_norm_(*there, 1e-6, scale=0.5)
            assert all(same_bits(full(a), b.detach()) for a, b in zip(there, want))
    with pytest.raises(
        (RuntimeError, ValueError), match="expected residual to be placed as input is"
    ):
        rms_norm_add_rms_norm_(
            everywhere(x, mesh, Shard(0)), everywhere(residual, mesh, Replicate()), None, None
        )


@check(2)
def gated(rank, world, folder):
    """Rows may be sharded, and groups of columns are whole."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = mesh_of(world)
    x, gate, weight, dy = (
        random(4, 6, 16),
        random(4, 6, 16),
        random_weight(16, FP32),
        random(4, 6, 16),
    )
    for how in (
        {},
        {"group_size": 4},
        {"norm_before_gate": False, "group_size": 8},
        {"norm_before_gate": False, "activation": "sigmoid"},
    ):
        plain = [t.clone().requires_grad_() for t in (x, gate, weight)]
        want = rms_norm_gated(*plain, 1e-6, **how)
        wanted = torch.autograd.grad(want, plain, dy)
        for rows in (Replicate(), Shard(0), Shard(1)):
            placements = rows, rows, Replicate()
            leaves = [
                everywhere(t, mesh, p).requires_grad_()
                for t, p in zip((x, gate, weight), placements)
            ]
            with no_communication():
                got = rms_norm_gated(*leaves, 1e-6, **how)
            assert got.placements == (rows,) and same_bits(full(got), want.detach())
            grads = torch.autograd.grad(got, leaves, everywhere(dy, mesh, rows))
            assert all(same_bits(full(a), b) for a, b in zip(grads[:2], wanted))
            torch.testing.assert_close(full(grads[2]), wanted[2], rtol=1e-5, atol=1e-5)
            with torch.no_grad(), no_communication():
                got = rms_norm_gated_quant(*leaves, 1e-6, dtype=torch.int8, **how)
                codes = rms_norm_gated_quant(*plain, 1e-6, dtype=torch.int8, **how)
            assert all(torch.equal(full(a), b) for a, b in zip(got, codes))
        with torch.no_grad():
            columns = everywhere(x, mesh, Shard(2))
            got = rms_norm_gated(columns, everywhere(gate, mesh, Shard(0)), **how)
            assert same_bits(full(got), rms_norm_gated(x, gate, **how))


@check(2, 4)
def rotated_heads(rank, world, folder):
    """Heads, tokens or the batch may be sharded; with a weight across heads these are whole."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = mesh_of(world)
    for weight_shape, heads_dim in (((16,), -2), ((8, 16), -3), ((16,), -3), ((128,), -2)):
        heads = (4, 6, 8, 16), (4, 6, 4, 16)
        q, k = (random(*shape) for shape in heads)
        if heads_dim == -3:
            q, k = q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()
        w, v, cos, sin = random_weight(weight_shape, FP32), random_weight(16, FP32), *angle(6, 8)
        plain = [t.clone().requires_grad_() for t in (q, k, w, v)]
        want = rms_norm_rope(*plain, cos, sin, 1e-6, heads_dim=heads_dim)
        upstream = [random(*t.shape) for t in want]
        wanted = torch.autograd.grad(want, plain, upstream)
        for dim in (None, 0, 1, 2):
            rows = Replicate() if dim is None else Shard(dim)
            of_heads = dim == 4 + heads_dim
            own = Shard(0) if of_heads and len(weight_shape) == 2 else Replicate()
            placements = rows, rows, own, Replicate()
            leaves = [
                everywhere(t, mesh, p).requires_grad_() for t, p in zip((q, k, w, v), placements)
            ]
            tokens = Shard(0) if dim == (1 if heads_dim == -2 else 2) else Replicate()
            angles = [everywhere(t, mesh, tokens) for t in (cos, sin)]
            gathers = of_heads and weight_shape == (128,)
            with contextlib.nullcontext() if gathers else no_communication():
                got = rms_norm_rope(*leaves, *angles, 1e-6, heads_dim=heads_dim)
            assert gathers or all(t.placements == (rows,) for t in got)
            assert all(same_bits(full(a), b.detach()) for a, b in zip(got, want))
            there = [everywhere(t, mesh, rows) for t in upstream]
            grads = torch.autograd.grad(got, leaves, there)
            assert all(same_bits(full(a), b) for a, b in zip(grads[:2], wanted))
            for a, b in zip(grads[2:], wanted[2:]):
                torch.testing.assert_close(full(a), b, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        x, cache = random(4, 6, 8, 16), angle(9, 8)
        positions = torch.randint(0, 9, (2, 4, 6))
        dx, whole = everywhere(x, mesh, Shard(0)), [everywhere(t, mesh, Replicate()) for t in cache]
        by_row = everywhere(positions, mesh, Shard(1))
        how = {"sections": [3, 5], "positions": by_row}
        with no_communication():
            got = rms_norm_rope(dx, None, None, None, *whole, 1e-6, **how)[0]
        how["positions"] = positions
        assert same_bits(full(got), rms_norm_rope(x, None, None, None, *cache, 1e-6, **how)[0])
        again = everywhere(x, mesh, Shard(0))
        rms_norm_rope_(again, None, None, None, *whole, 1e-6, sections=[3, 5], positions=by_row)
        assert same_bits(full(again), full(got))
        with pytest.raises(RuntimeError, match="k to be placed as q is"):
            other = everywhere(x, mesh, Replicate())
            rms_norm_rope_(again, other, None, None, *whole, sections=[3, 5], positions=by_row)


def angle(*shape):
    t = random(*shape)
    return t.cos(), t.sin()


@check(2)
@torch.no_grad()
def in_place_is_refused_where_it_would_write_to_a_copy(rank, world, folder):
    from torch.distributed.tensor import Replicate, Shard

    mesh, x = mesh_of(world), random(4, 8, 32)
    for input, residual, message in (
        (Shard(0), Replicate(), "residual to be placed as input is"),
        (Shard(2), Shard(2), "in-?place"),
    ):
        there = everywhere(x, mesh, input), everywhere(x, mesh, residual)
        with pytest.raises(RuntimeError, match=message):
            fused_add_rms_norm_(*there)
        assert all(torch.equal(full(t), x) for t in there)
    there = everywhere(x, mesh, Shard(0))
    with pytest.raises(NotImplementedError, match="rms_norm.out"):
        rms_norm(there, 32, out=there)
    assert torch.equal(full(there), x)


@check(2)
def decisions_are_not_mixed_up(rank, world, folder):
    """DTensor remembers its decisions by the arguments. Each of these differs from the last in one
    that is no tensor.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh = mesh_of(world)
    x, weight = random(4, 8, 64, dtype=BF16), random_weight(64, FP32)
    dx, dw = everywhere(x, mesh, Shard(1)), everywhere(weight, mesh, Replicate())
    for shape in ((64,), (8, 64), (64,)):
        got = rms_norm(dx, shape)
        assert got.placements[0].is_shard(1) == (len(shape) == 1) and same_bits(
            full(got), rms_norm(x, shape)
        )
    for cast in (False, True, False):
        got = rms_norm(dx, 64, dw, cast_before_weight=cast)
        assert got.dtype == got.to_local().dtype == (FP32 if cast else BF16)
    rstd = ops.rms_norm_forward(dx, [64], dw)[1]
    for mask in ((True, True), (True, False), (False, True), (True, True)):
        got = ops.rms_norm_backward(dx, dx, [64], dw, rstd, None, mask)
        assert tuple(t is not None for t in got) == mask
    for keep, dtype in (
        (False, torch.int8),
        (True, torch.int8),
        (True, torch.float8_e5m2),
        (False, torch.int8),
    ):
        q, scale, norm = ops.rms_norm_quant(dx, dw, dtype=dtype, keep_norm=keep)
        assert q.dtype == q.to_local().dtype == dtype and norm.shape == (x.shape if keep else (0,))
    for block, column_major in ((None, False), (64, False), (64, True)):
        scale = ops.rms_norm_quant(
            dx, dw, dtype=torch.int8, block=block, column_major=column_major
        )[1]
        assert (
            scale.stride()
            == rms_norm_quant(x, weight, dtype=torch.int8, block=block, column_major=column_major)[
                1
            ].stride()
        )


@check(2)
def what_needs_no_gradient_gets_none(rank, world, folder):
    from torch.distributed.tensor import Replicate, Shard

    mesh, x, weight = mesh_of(world), random(4, 8, 32), random_weight(32, FP32)
    for frozen in (0, 1):
        leaves = [everywhere(x, mesh, Shard(1)), everywhere(weight, mesh, Replicate())]
        leaves[1 - frozen].requires_grad_()
        rms_norm(leaves[0], 32, leaves[1]).sum().backward()
        assert leaves[frozen].grad is None and leaves[1 - frozen].grad is not None
    # Second derivatives go through the formula in ATen ops, which DTensor knows.
    x, grads = random(4, 8, dtype=torch.float64), []
    for t in (x.clone().requires_grad_(), everywhere(x, mesh, Shard(0)).requires_grad_()):
        (first,) = torch.autograd.grad(rms_norm(t, 8).pow(3).sum(), t, create_graph=True)
        grads.append(torch.autograd.grad(first.pow(2).sum(), t)[0])
    torch.testing.assert_close(full(grads[1]), grads[0])


@check(2)
def compiled(rank, world, folder):
    from torch.distributed.tensor import Replicate, Shard

    def layer(x, residual, weight):
        y, residual = fused_add_rms_norm(rms_norm(x, 32, weight, 1e-6), residual, weight)
        return y * 2, residual

    mesh = mesh_of(world)
    for dynamic in (False, True):
        function = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for length in (6, 9):
            leaves = [random(2, length, 32), random(2, length, 32), random_weight(32, FP32)]
            there = [
                everywhere(t, mesh, p).requires_grad_()
                for t, p in zip(leaves, (Shard(1), Shard(1), Replicate()))
            ]
            got, want = function(*there), layer(*leaves)
            assert all(
                a.placements == (Shard(1),) and same_bits(full(a), b)
                for a, b in zip(got, want, strict=True)
            )
            grads = [
                torch.autograd.grad([t.sum() for t in f(*there)], there) for f in (function, layer)
            ]
            assert all(same_bits(full(a), full(b)) for a, b in zip(*grads, strict=True))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.head = width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x):
        # As many heads as there are columns on this rank.
        q, k, v = (
            f(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        return self.out(
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .flatten(-2)
        )


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(width, 64, bias=False),
            nn.Linear(width, 64, bias=False),
            nn.Linear(64, width, bias=False),
        )

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Of the Llama family; the second norm adds the residual."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.norm, self.post_norm = (
            RMSNorm(width, 1e-6, cast_before_weight=True),
            RMSNorm(width, 1e-6, **GEMMA),
        )
        self.attention, self.feed_forward = Attention(width, heads), FeedForward(width)
        for norm in (self.norm, self.post_norm):
            nn.init.normal_(norm.weight, 0.5, 0.2)

    def forward(self, x):
        y, x = self.post_norm(self.attention(self.norm(x)), residual=x)
        return x + self.feed_forward(y)


@check(2, 4)
def tensor_and_sequence_parallel(rank, world, folder):
    """Norms keep their bits; behind a row-parallel projection a sum of `world` parts is rounded
    otherwise: some eps.
    """
    import copy

    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    def row_parallel():
        return RowwiseParallel(output_layouts=Shard(1), use_local_output=False)

    def gathered():
        return PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))

    plan = {
        "norm": SequenceParallel(),
        "attention": gathered(),
        **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
        "attention.out": row_parallel(),
        "post_norm": SequenceParallel(),
        "feed_forward": gathered(),
        **{f"feed_forward.{name}": ColwiseParallel() for name in ("gate", "up")},
        "feed_forward.down": row_parallel(),
    }
    mesh, single = mesh_of(world), Block()
    parallel = parallelize_module(copy.deepcopy(single), mesh, plan)
    for name in ("norm", "post_norm"):  # SequenceParallel's documentation speaks of weights of one
        assert torch.equal(full(getattr(parallel, name).weight), getattr(single, name).weight)
    x, upstream = random(2, 8, 32), random(2, 8, 32)
    leaf = x.clone().requires_grad_()
    want = single(leaf)
    want.backward(upstream)
    norms = []
    parallel.norm.register_forward_hook(lambda module, args, output: norms.append(output.detach()))
    for model in (parallel, torch.compile(parallel, backend="aot_eager", fullgraph=True)):
        parallel.zero_grad()
        there = everywhere(x, mesh, Shard(1)).requires_grad_()
        got = model(there)
        got.backward(everywhere(upstream, mesh, Shard(1)))
        assert got.placements == there.grad.placements == (Shard(1),)
        torch.testing.assert_close(full(got), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(full(there.grad), leaf.grad, rtol=1e-5, atol=1e-5)
        for (name, a), (_, b) in zip(
            parallel.named_parameters(), single.named_parameters(), strict=True
        ):
            torch.testing.assert_close(
                full(a.grad), b.grad, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}"
            )
        assert norms[0].placements == (Shard(1),) and same_bits(full(norms[0]), single.norm(x))
    # A plain local shard goes in and out, too.
    norm = parallelize_module(
        copy.deepcopy(single.post_norm), mesh, SequenceParallel(use_local_output=True)
    )
    assert same_bits(norm(x.chunk(world, 1)[rank]), single.post_norm(x).chunk(world, 1)[rank])


def trained(model, batches, wrap=lambda model: model):
    """The parameters after an SGD step for each batch."""
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches:
        wrapped(batch).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def blocks():
    torch.manual_seed(1)
    return nn.Sequential(Block(), Block(), RMSNorm(32))


@check(2, 4)
def data_parallel(rank, world, folder):
    """Two steps, each process on its part of the batch; gradients are averaged in another order:
    some eps.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def shard(model):
        for block in model:
            fully_shard(block)
        return fully_shard(model)

    batches = [random(4, 8, 32) for _ in range(2)]
    want, mine = trained(blocks(), batches), [batch.chunk(world)[rank] for batch in batches]
    replicated, sharded = (
        trained(blocks(), mine, DistributedDataParallel),
        trained(blocks(), mine, shard),
    )
    for name, value in want.items():
        torch.testing.assert_close(replicated[name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(full(sharded[name]), value, rtol=1e-5, atol=1e-6)


@check(2, 4)
def fully_sharded_in_bfloat16(rank, world, folder):
    """Forward: the bits of the model in bfloat16. Gradients: the average of those, in fp32. Then to
    a checkpoint and back.
    """
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def shard(model):
        policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)
        for block in model:
            fully_shard(block, mp_policy=policy)
        return fully_shard(model, mp_policy=policy)

    x = random(world, 8, 32).chunk(world)[rank]
    single, sharded = blocks().to(BF16), shard(blocks())
    want, got = single(x.to(BF16)), sharded(x)
    assert same_bits(got, want)
    for y in (want, got):
        y.float().pow(2).mean().backward()
    for (name, a), (_, b) in zip(
        sharded.named_parameters(), single.named_parameters(), strict=True
    ):
        average = b.grad.float()
        dist.all_reduce(average)
        assert a.grad.dtype == FP32
        torch.testing.assert_close(
            full(a.grad), average / world, msg=lambda text: f"{name}: {text}"
        )

    saved = {name: t.detach().clone() for name, t in sharded.state_dict().items()}
    checkpoint.save({"model": sharded.state_dict()}, checkpoint_id=folder / "checkpoint")
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.zero_()
    state = {"model": sharded.state_dict()}
    checkpoint.load(state, checkpoint_id=folder / "checkpoint")
    sharded.load_state_dict(state["model"])
    assert all(torch.equal(full(t), full(saved[name])) for name, t in sharded.state_dict().items())


@check(2, 4)
def context_parallel_shards(rank, world, folder):
    """The sequence is split by torch's context_parallel, in its own order; a norm needs nothing of
    the other processes.
    """
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import context_parallel_unshard

    mesh, norm, x = mesh_of(world), RMSNorm(32), random(2, 8, 32)
    want, buffer = norm(x), x.clone()
    with no_communication(), context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[1]):
        assert buffer.shape == (2, 8 // world, 32)
        leaf = buffer.clone().requires_grad_()
        local = norm(leaf)
        local.square().sum().backward()
    assert same_bits(context_parallel_unshard(mesh, [local.detach()], [1])[0], want.detach())
    whole = x.clone().requires_grad_()
    dx, dweight = torch.autograd.grad(norm(whole).square().sum(), (whole, norm.weight))
    assert same_bits(context_parallel_unshard(mesh, [leaf.grad], [1])[0], dx)
    dist.all_reduce(norm.weight.grad)  # each process has seen its part of the sequence
    torch.testing.assert_close(norm.weight.grad, dweight, rtol=1e-5, atol=1e-5)


@check(2, 4)
def hidden_sharded(rank, world, folder):
    """rms_norm_sharded: one all-reduce each way. In 16 bits within 1 ulp of fp64 rounded once. In
    fp32 within 4, as F.rms_norm is: each of sum, mean, rsqrt, weight + offset and two products
    rounds by half an ulp. Gradients: some eps."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    from rmsnorm_cuda import rms_norm_sharded
    from rmsnorm_cuda.reference import rms_norm_backward_reference, rms_norm_reference, ulp_distance

    for dtype, weight_dtype, options in itertools.product(
        (FP32, BF16, torch.float16), (FP32, None), ({}, GEMMA, LLAMA)
    ):
        for size in (64 * world, 64 * world - 3):  # evenly, and not
            x, weight = random(3, 5, size, dtype=dtype), random_weight(size, weight_dtype)
            leaf = x.chunk(world, -1)[rank].clone().requires_grad_()
            part = None if weight is None else weight.chunk(world)[rank].clone().requires_grad_()
            with CommDebugMode() as mode:
                y = rms_norm_sharded(leaf, size, part, 1e-6, **options)
            assert mode.get_total_counts() == 1
            want = rms_norm_reference(x, (size,), weight, 1e-6, **options)
            parts = [
                torch.empty(3, 5, (size + world - 1) // world, dtype=y.dtype) for _ in range(world)
            ]
            dist.all_gather(
                parts, nn.functional.pad(y.detach(), (0, parts[0].shape[-1] - y.shape[-1]))
            )
            whole = torch.cat(parts, -1)[..., :size]
            if dtype == FP32:
                assert whole.dtype == FP32 and ulp_distance(whole, want).max() <= 4
            else:
                assert_forward(whole, x, (size,), weight, 1e-6, options)
            dy = random(3, 5, size, dtype=y.dtype)
            with CommDebugMode() as mode:
                grads = torch.autograd.grad(
                    y, [leaf] if part is None else [leaf, part], dy.chunk(world, -1)[rank]
                )
            assert mode.get_total_counts() == 1
            want = rms_norm_backward_reference(dy, x, (size,), weight, 1e-6, **options)
            torch.testing.assert_close(
                grads[0].double(),
                want[0].chunk(world, -1)[rank],
                rtol=torch.finfo(dtype).eps,
                atol=1e-5,
            )
            if part is not None:  # a rounded xhat may be a tie that falls the other way
                atol = 16 * torch.finfo(dtype).eps if options == LLAMA else 1e-5
                torch.testing.assert_close(
                    grads[1].double(), want[1].chunk(world)[rank], rtol=1e-5, atol=atol
                )

    def layer(x, weight):
        return rms_norm_sharded(x * 1.0, 64 * world, weight, 1e-6) * 2

    leaves = [random(2, 4, 64).requires_grad_(), random_weight(64, FP32).requires_grad_()]
    fullgraph = torch.__version__ >= "2.12.dev0"  # see sharded.py
    results = [
        f(*leaves) for f in (layer, torch.compile(layer, backend="aot_eager", fullgraph=fullgraph))
    ]
    grads = [torch.autograd.grad(y.pow(2).sum(), leaves, create_graph=True) for y in results]
    assert torch.equal(*results) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0][0].sum().backward()
    with pytest.raises(
        ValueError, match="normalized_size to be at least input's 64 columns, but got 32"
    ):
        rms_norm_sharded(leaves[0], 32)
    with pytest.raises(RuntimeError, match=r"weight of shape \[32\] and normalized_shape=\[64\]"):
        rms_norm_sharded(leaves[0], 64 * world, leaves[1][:32])
    with pytest.raises(ValueError, match="eps to be finite and not negative"):
        rms_norm_sharded(leaves[0], 64 * world, eps=-5.0)
    with pytest.raises(NotImplementedError, match="'Long'"):
        rms_norm_sharded(leaves[0].long(), 64 * world)
    with pytest.raises(ValueError, match="scalar"):
        rms_norm_sharded(torch.tensor(1.0), 64 * world)
    with pytest.raises(TypeError, match="DTensor"):
        rms_norm_sharded(distribute_tensor(random(3, 64), mesh_of(world), [Shard(1)]), 64)


@pytest.mark.parametrize(
    "world, name",
    [
        pytest.param(world, check.__name__, marks=pytest.mark.slow if world == 4 else [])
        for world, checks in CHECKS.items()
        for check in checks
    ],
)
def test_processes(world, name, processes):
    folder, error = processes(world)
    assert all((folder / f"{name}.{rank}").exists() for rank in range(world)), error


RUN = """
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    x = distribute_tensor(torch.randn(4, 8), dist.init_device_mesh("cpu", (1,)), [Shard(0)])
    y = torch.ops.rmsnorm_cuda.rms_norm(x, [8])
    assert torch.equal(y.to_local(), rmsnorm_cuda.rms_norm(x.to_local(), 8))
    assert y.placements == x.placements
    ours = [f for f in sys.meta_path if type(f).__module__.startswith("rmsnorm_cuda")]
    assert not [f for f in ours if "torch.distributed.tensor" in f.names]
"""
ORDERS = {
    "first": """
        import rmsnorm_cuda
        assert not [name for name in sys.modules if name.startswith("torch.distributed.tensor")]
        importlib.reload(rmsnorm_cuda)
        # Somebody asks if it is there.
        assert importlib.util.find_spec("torch.distributed.tensor").loader
        import torch.distributed.tensor
        loader = torch.distributed.tensor.__spec__.loader
        assert loader is torch.distributed.tensor.__loader__ and not vars(loader).get("exec_module")
    """,
    "second": """
        import torch.distributed.tensor
        import rmsnorm_cuda
        importlib.reload(rmsnorm_cuda)
    """,
    "fails at first": """
        import rmsnorm_cuda
        sys.modules["torch.distributed.tensor._ops"] = None
        try:
            import torch.distributed.tensor
        except ImportError:
            del sys.modules["torch.distributed.tensor._ops"]
        import torch.distributed.tensor
    """,
}


@pytest.mark.parametrize("order", ORDERS)
def test_import(order):
    """The rules are there whatever is imported first, and nobody who does not use DTensor waits for
    it.
    """
    strict = """
        import importlib.util, sys, torch, warnings
        warnings.filterwarnings("error", category=UserWarning, module="rmsnorm_cuda")
    """
    done = programs.run("".join(map(textwrap.dedent, (strict, ORDERS[order], RUN))), timeout=60)
    assert done.returncode == 0, done.stderr


def test_import_in_threads():
    """torch's modules import each other, and threads may see them half done and fail; but none
    waits for another for ever.
    """
    code = """if True:
        import contextlib, importlib, threading, torch, rmsnorm_cuda
        def load(name):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        tensor = "torch.distributed.tensor"
        names = (tensor, f"{tensor}.experimental", f"{tensor}.parallel") * 2
        threads = [threading.Thread(target=load, args=(name,)) for name in names]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        import torch.distributed.tensor.experimental
        from torch.distributed.tensor import DTensor
        op = torch.ops.rmsnorm_cuda.rms_norm.default
        assert op in DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    """
    ran = programs.run(code, timeout=60)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_of_a_swapped_model(use_orig_params, tmp_path):
    """Swapped before it is wrapped. Afterwards weights are views of one flat parameter, and the
    reason says to swap before.
    """
    program = f"""if True:
        import copy, torch, torch.distributed as dist, warnings
        from torch import nn
        from torch.distributed.fsdp import FullyShardedDataParallel
        from rmsnorm_cuda import replace_rms_norm

        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
        wrap = lambda model: FullyShardedDataParallel(
            model, use_orig_params={use_orig_params}, device_id=torch.device("cpu")
        )
        model, x = nn.Sequential(nn.Linear(16, 16), nn.RMSNorm(16, 1e-6)), torch.randn(3, 16)
        nn.init.normal_(model[1].weight)
        want, late = model(x).detach(), wrap(copy.deepcopy(model))
        assert len(replace_rms_norm(model)) == 1
        early = wrap(model)
        torch.testing.assert_close(early(x).detach(), want)
        early(x).sin().sum().backward()
        assert all("swap before" in entry.reason for entry in replace_rms_norm(late).skipped)
        torch.testing.assert_close(late(x).detach(), want)
        dist.destroy_process_group()
    """
    run = programs.run(program)
    assert run.returncode == 0, run.stderr
