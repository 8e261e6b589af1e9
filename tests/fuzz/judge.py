"""RMSNorm and its gradients from the formula, in numpy's longdouble, and how far a result may be
from that. Nothing here is the product's: a fault of rmsnorm_cuda/reference.py is found too.

Derivations of the tolerances: tests/README.md.
"""

import numpy as np
import torch

LONG = np.longdouble
# dtype: bits of the significand, exponent of the smallest normal number and of the largest.
FORMATS = {
    torch.float32: (24, -126, 127),
    torch.float16: (11, -14, 15),
    torch.bfloat16: (8, -126, 127),
    torch.float64: (53, -1022, 1023),
    torch.float8_e4m3fn: (4, -6, 8),
    torch.float8_e5m2: (3, -14, 15),
}
# What the arithmetic before the last rounding may be off by, relatively: some roundings of fp32;
# fp32's own products are formed to twice its precision.
SLACK = {torch.float32: LONG(2) ** -24, torch.float64: LONG(2) ** -50}
SIXTEEN_BIT = (torch.float16, torch.bfloat16)
SLACK_16_BIT = LONG(2) ** -21
VIA_FP32 = LONG(2) ** -23
# Of a product, by the dtype computed in. The forward forms those of fp32 in twice its precision.
UNDERFLOW = {torch.float32: LONG(2) ** -148, torch.float64: LONG(2) ** -1073}
# That a term of dweight goes through at most, by the dtype computed in: 32 rows, or a group more,
# and 8 such sums in fp32, 256 rows and 128 blocks in fp64. Equal terms are all rounded to the same
# side.
ADDITIONS = {torch.float32: 48, torch.float64: 384}


def exact(t):
    """The values of a tensor in longdouble."""
    return t.detach().double().numpy().astype(LONG)


def quantum(values, dtype):
    """The distance of two neighbours of `dtype` where each value lies."""
    bits, least, _ = FORMATS[dtype]
    exponent = np.frexp(np.where(np.isfinite(values), values, 0))[1] - 1
    exponent = np.where(values == 0, least, np.maximum(exponent, least))
    return np.ldexp(LONG(1), exponent - (bits - 1))


def rounded(values, dtype):
    """Each value rounded once to `dtype`, to nearest even; what is too large becomes infinite."""
    bits, _, most = FORMATS[dtype]
    step = quantum(values, dtype)
    with np.errstate(invalid="ignore"):
        near = np.rint(values / step) * step
    limit = np.ldexp(LONG(2) - LONG(2) ** (1 - bits), most)
    return np.where(np.abs(near) > limit, np.copysign(LONG(np.inf), values), near)


def is_between(got, low, high):
    """Element by element; a NaN is between NaNs."""
    got = exact(got)
    low, high = np.minimum(low, high), np.maximum(low, high)
    with np.errstate(invalid="ignore"):
        inside = (low <= got) & (got <= high)
    return inside | (np.isnan(got) & np.isnan(low) & np.isnan(high))


def widened(low, high, ulps, dtype):
    """The interval with so many ulps of `dtype` on either side."""
    low, high = np.minimum(low, high), np.maximum(low, high)
    return low - ulps * quantum(low, dtype), high + ulps * quantum(high, dtype)


def compute_dtype(*tensors):
    fp64 = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if fp64 else torch.float32


class Norm:
    """The norm of x over its last `dims` dimensions, and what a result may be. rounds_to: the dtype
    that x, a sum in fp32, was not rounded to.
    """

    def __init__(
        self,
        x,
        dims,
        weight=None,
        eps=None,
        weight_offset=0.0,
        cast_before_weight=False,
        rounds_to=None,
    ):
        self.x, self.weight, self.cast = x, weight, cast_before_weight and weight is not None
        self.rounds_to = rounds_to or x.dtype
        self.axes = tuple(range(x.dim() - dims, x.dim()))
        self.lead = tuple(range(x.dim() - dims))
        if eps is None:
            eps = 2.0**-52 if x.dtype == torch.float64 else 2.0**-23
        values = exact(x)
        self.count = max(np.prod([x.shape[i] for i in self.axes], dtype=int), 1)
        with np.errstate(all="ignore"):
            mean = (values * values).sum(self.axes, keepdims=True) / self.count
            mean = mean if x.numel() else np.full_like(mean, np.nan)  # over nothing
            self.rstd = 1 / np.sqrt(mean + LONG(eps))
            self.xhat = values * self.rstd
        self.gain = None
        if weight is not None:
            self.gain = exact(weight) + LONG(weight_offset)
            if compute_dtype(x, weight) == torch.float32:
                offset = np.float32(weight_offset)
                self.gain = (weight.float().numpy() + offset).astype(LONG)

    @property
    def dtype(self):
        return (
            torch.promote_types(self.rounds_to, self.weight.dtype) if self.cast else self.rounds_to
        )

    def check(self, y, dtype=None):
        """`y` is the norm in `dtype`, its own unless another is given."""
        dtype = dtype or self.dtype
        assert y.dtype == dtype and y.shape == self.x.shape, (y.dtype, y.shape)
        low, high = self._interval(dtype)
        good = is_between(y, low, high)
        if self.gain is not None:  # what vanishes in the dtype computed in, times infinity
            first = self.rounds_to if self.cast else compute_dtype(self.x, self.weight)
            tiny = 2.0 ** FORMATS[first][1]
            good |= np.isinf(self.gain) & (np.abs(self.xhat) < tiny) & np.isnan(exact(y))
        assert good.all(), self._told("output", y, low, high, good)

    def _interval(self, dtype):
        first = self.rounds_to if self.cast else dtype  # that is rounded to
        slack = SLACK.get(first, SLACK_16_BIT)
        wide = compute_dtype(self.x, self.weight) == torch.float64
        with np.errstate(all="ignore"):
            bounds = [self.xhat * (1 - slack), self.xhat * (1 + slack)]
            if self.cast:
                bounds = [rounded(b, first) for b in bounds]
                if first == torch.float32 or wide:
                    bounds = widened(*bounds, 8 if wide else 1, first)
                bounds = [b * self.gain for b in bounds]
            elif self.gain is not None:
                bounds = [b * self.gain for b in bounds]
            if dtype != torch.float64:
                low, high = np.minimum(*bounds), np.maximum(*bounds)
                if dtype in SIXTEEN_BIT:  # it may be rounded to fp32 first
                    low = low * np.where(low < 0, 1 + VIA_FP32, 1 - VIA_FP32)
                    high = high * np.where(high < 0, 1 - VIA_FP32, 1 + VIA_FP32)
                bounds = [low - UNDERFLOW[torch.float32], high + UNDERFLOW[torch.float32]]
            bounds = [rounded(b, dtype) for b in bounds]
            if dtype == torch.float64:
                gain = 1 if self.gain is None else 1 + np.abs(self.gain)
                vanished = UNDERFLOW[dtype] * np.where(np.isfinite(gain), gain, 0)
                low, high = np.minimum(*bounds), np.maximum(*bounds)
                bounds = widened(low - vanished, high + vanished, 8, dtype)
        return bounds

    def check_rstd(self, rstd):
        dtype = compute_dtype(self.x)
        want = np.where(np.isnan(self.rstd), np.nan, self.rstd).reshape(rstd.shape)
        assert rstd.dtype == dtype, rstd.dtype
        once = rounded(want, dtype)
        low, high = widened(once, once, 8 if dtype == torch.float64 else 1, dtype)
        good = is_between(rstd, low, high) | (exact(rstd) == once)
        assert good.all(), self._told("rstd", rstd, low, high, good)

    def check_gradients(self, dx, dweight, dy, dresidual=None):
        """None: not wanted. With u = eps / 2 of the type computed in, see assert_backward() in
        cases.py.
        """
        computed = compute_dtype(self.x, self.weight, dy)
        eps, underflow = LONG(2) ** (-52 if computed == torch.float64 else -23), UNDERFLOW[computed]
        grad = exact(dy)
        with np.errstate(all="ignore"):
            g = grad if self.gain is None else grad * self.gain
            products = g * self.xhat
            c = products.sum(self.axes, keepdims=True) / self.count
            if dx is not None:
                size = np.abs(products).sum(self.axes, keepdims=True) / self.count
                want = self.rstd * (g - self.xhat * c)
                error = eps * self.rstd * (2 * np.abs(g) + 14 * np.abs(self.xhat) * size)
                error += underflow * (self.rstd * (1 + np.abs(c)) + 1)
                if dresidual is not None:
                    error += eps * np.abs(want)
                    want = want + exact(dresidual)
                self._check_near("grad_input", dx, want, error)
            if dweight is not None:
                seen, ties = self.xhat, LONG(0)
                terms = np.abs(grad * self.xhat)
                if self.cast:  # a near-tie may fall to either side
                    seen = rounded(seen, self.x.dtype)
                    sides = [rounded(self.xhat * (1 + s * eps), self.x.dtype) for s in (-2, 2)]
                    ties = (np.abs(sides[1] - sides[0]) * np.abs(grad)).sum(self.lead)
                want = (grad * seen).sum(self.lead)
                rows = np.prod([self.x.shape[i] for i in self.lead], dtype=int)
                roundings = 4 + min(rows, ADDITIONS[computed])
                error = roundings * eps / 2 * terms.sum(self.lead) + ties
                error += underflow * (1 + np.abs(grad)).sum(self.lead)
                self._check_near("grad_weight", dweight, want, error)

    def _check_near(self, what, got, want, error):
        with np.errstate(all="ignore"):
            once = rounded(want, got.dtype)
            error = error + quantum(want, got.dtype)
            low, high = want - error, want + error
            good = is_between(got, low, high)
            # An error beyond the dtype's largest value may be infinity.
            good |= is_between(got, rounded(low, got.dtype), rounded(high, got.dtype))
            good |= (exact(got) == once) | (np.isnan(exact(got)) & np.isnan(want))
        assert good.all(), self._told(what, got, low, high, good)

    def _told(self, what, got, low, high, good):
        at = tuple(int(i) for i in np.argwhere(~good)[0])
        return (
            f"{(~good).sum()} of {good.size} elements of {what} are wrong: at {at} "
            f"{exact(got)[at]!r}, which is not in [{low[at]!r}, {high[at]!r}]"
        )


def check_rotated(y, x, weight, cos, sin, heads_dim, interleaved, cast, weight_offset, eps):
    """`y` is q or k of rms_norm_rope, rounded once; cos and sin are those of each token."""
    x = x.transpose(-3, -2) if heads_dim == -3 else x
    y = y.transpose(-3, -2) if heads_dim == -3 else y
    heads, cols = x.shape[-2:]
    across = weight is not None and weight.dim() == 1 and len(weight) != cols
    norm = Norm(x.flatten(-2) if across else x, 1, None, eps)
    xhat = norm.xhat.reshape(x.shape)
    cast = cast and weight is not None
    dtype = torch.promote_types(x.dtype, weight.dtype) if cast else x.dtype
    assert y.dtype == dtype, (y.dtype, dtype)
    computed = compute_dtype(x, weight)
    error = np.abs(xhat) * 4 * SLACK[computed]
    if cast:  # a near-tie may fall to either side
        once = rounded(xhat, x.dtype)
        sides = [rounded(xhat * (1 + s * SLACK[computed] * 4), x.dtype) for s in (-1, 1)]
        xhat, error = once, np.abs(once) * 4 * SLACK[computed] + np.abs(sides[1] - sides[0])
    if weight is not None:
        # In the type computed in.
        gain = exact(weight.to(computed) + torch.tensor(weight_offset, dtype=computed))
        if not weight_offset:
            gain = exact(weight)
        gain = gain.reshape(heads, cols) if across else gain
        xhat, error = xhat * gain, error * np.abs(gain)
    # Each product and sum rounds once more.
    error = error + np.abs(xhat) * 4 * SLACK[computed]
    cos, sin = (exact(t.to(computed))[..., None, :] for t in (cos, sin))
    pairs = cos.shape[-1]
    a = (slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs),)
    b = (slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs),)
    want, bound = xhat.copy(), error.copy()
    with np.errstate(all="ignore"):
        for of, other, sign in ((a, b, -1), (b, a, 1)):
            want[..., of[0]] = xhat[..., of[0]] * cos + sign * xhat[..., other[0]] * sin
            bound[..., of[0]] = error[..., of[0]] * np.abs(cos) + error[..., other[0]] * np.abs(sin)
        bound = bound + 4 * UNDERFLOW[computed]
        low, high = rounded(want - bound, dtype), rounded(want + bound, dtype)
    good = is_between(y, low, high) | ~np.isfinite(want)
    at = None if good.all() else tuple(int(i) for i in np.argwhere(~good)[0])
    assert at is None, (
        f"{(~good).sum()} of {good.size} elements are wrong: at {at} {exact(y)[at]!r}, which is "
        f"not in [{low[at]!r}, {high[at]!r}]"
    )


class Gated:
    """The norm of x and a gate, in intervals: each step of the kernels widens what it may give."""

    def __init__(self, x, gate, weight, eps, activation, norm_before_gate, group_size, *options):
        weight_offset, cast_before_weight = options
        self.x, self.weight = x, weight
        self.computed = compute_dtype(x, gate, weight)
        self.cast = cast_before_weight and weight is not None
        self.size = group_size or max(x.shape[-1], 1)
        self.is_first = gate is not None and not norm_before_gate
        self.is_last = gate is not None and norm_before_gate
        if eps is None:
            eps = 2.0**-52 if x.dtype == torch.float64 else 2.0**-23
        self.slack, self.underflow = SLACK[self.computed], UNDERFLOW[self.computed]
        values, self.act, self.slope, off = exact(x), LONG(1), LONG(0), LONG(0)
        self.unit = self.underflow  # of a denormal exponential, which silu multiplies by the gate
        with np.errstate(all="ignore"):
            if gate is not None:
                g = exact(gate)
                if activation == "silu":
                    self.unit = self.underflow * (1 + np.where(np.abs(g) < 800, np.abs(g), 0))
                sigmoid = 1 / (1 + np.exp(-g))
                self.act = g * sigmoid if activation == "silu" else sigmoid
                self.slope = sigmoid * (1 - sigmoid)
                if activation == "silu":
                    self.slope = sigmoid + g * self.slope
            if self.is_first:
                values = values * self.act
                off = np.abs(values) * 8 * self.slack + self.unit * (1 + np.abs(exact(x)))
            groups = self.grouped(values)
            self.rstd = 1 / np.sqrt((groups * groups).mean(-1, keepdims=True) + LONG(eps))
            self.xhat = (groups * self.rstd).reshape(values.shape)
            # What the sum of squares is off by, relatively: its root's.
            lost = self.rstd * np.sqrt(
                (self.grouped(off + 0 * values) ** 2).mean(-1, keepdims=True)
            )
            spread = np.broadcast_to(self.rstd, groups.shape).reshape(values.shape)
            lost = np.broadcast_to(lost, groups.shape).reshape(values.shape)
            self.error = off * spread + np.abs(self.xhat) * (2 * lost + 4 * self.slack)
            # Rows that are lost among fp32's denormals, or beyond its numbers, are not judged.
            most = LONG(2) ** (FORMATS[self.computed][2] - 1)
            self.judged = (lost < 0.01) & (self.largest(np.abs(values)) < most)
            self.row_rstd = spread
        self.gain = None
        if weight is not None:
            self.gain = exact(weight)
            if weight_offset:
                offset = torch.tensor(weight_offset, dtype=self.computed)
                self.gain = exact(weight.to(self.computed) + offset)

    def grouped(self, values):
        return values.reshape(*values.shape[:-1], values.shape[-1] // self.size, self.size)

    def largest(self, values):
        """Of the group of each."""
        groups = self.grouped(values)
        if not values.size:
            return values
        return np.broadcast_to(groups.max(-1, keepdims=True), groups.shape).reshape(values.shape)

    def _times(self, low, high, factor, slack):
        with np.errstate(all="ignore"):
            sides = low * factor, high * factor
            low, high = np.minimum(*sides), np.maximum(*sides)
            reach = slack * np.maximum(np.abs(low), np.abs(high)) + self.underflow
            reach = reach + self.underflow * np.maximum(np.abs(factor), 1)
            return low - reach, high + reach

    def check(self, y):
        dtype = self.x.dtype
        product = torch.promote_types(dtype, self.weight.dtype) if self.cast else dtype
        result = dtype if self.is_last else product
        assert y.dtype == result and y.shape == self.x.shape, (y.dtype, y.shape)
        if not y.numel():
            return
        low, high = self.xhat - self.error, self.xhat + self.error
        if self.cast:
            low, high = widened(rounded(low, dtype), rounded(high, dtype), 0, dtype)
        if self.gain is not None:
            low, high = self._times(low, high, self.gain, 4 * self.slack)
        most = LONG(2) ** FORMATS[self.computed][2]
        with np.errstate(all="ignore"):
            judged = self.judged & np.isfinite(self.act + 0 * low)
            judged = judged & (np.maximum(np.abs(low), np.abs(high)) < most)
        if self.is_last:
            if self.cast:
                low, high = rounded(low, product), rounded(high, product)
                with np.errstate(invalid="ignore"):
                    judged = judged & np.isfinite(low) & np.isfinite(high)
            # A denormal activation is off by a unit of these, which the norm multiplies.
            size = np.maximum(np.abs(low), np.abs(high))
            low, high = self._times(low, high, self.act, 16 * self.slack)
            low, high = low - size * self.unit, high + size * self.unit
        good = is_between(y, rounded(low, result), rounded(high, result)) | ~judged
        at = None if good.all() else tuple(int(i) for i in np.argwhere(~good)[0])
        assert at is None, (
            f"{(~good).sum()} of {good.size} elements are wrong: at {at} {exact(y)[at]!r}, which "
            f"is not in [{low[at]!r}, {high[at]!r}]"
        )

    def check_gradients(self, results, dy, wants):
        """Those of the wanted; in rows of ordinary numbers, relative to the terms of which they are
        differences and sums.
        """
        dy, x = exact(dy), exact(self.x)
        with np.errstate(all="ignore"):
            gain = LONG(1) if self.gain is None else self.gain
            g = np.abs(dy * gain * (self.act if self.is_last else 1))
            largest = self.largest(g + 0 * x)
            of_norm = largest * self.row_rstd * (1 + np.abs(self.xhat))
            size = np.abs(x) + self.row_rstd + 1 / self.row_rstd + np.abs(dy) + np.abs(gain)
            # Of a group, whose elements are in each other's gradients.
            judged = self.judged & (
                self.largest(size + np.abs(self.act) + np.abs(self.slope)) < 1e8
            )
            if self.is_first:
                terms = {
                    "grad_input": of_norm * np.abs(self.act),
                    "grad_gate": of_norm * np.abs(x) * (np.abs(self.slope) + np.abs(self.act)),
                }
            else:
                product = np.abs(dy * self.xhat * gain)
                terms = {
                    "grad_input": of_norm,
                    "grad_gate": product * (np.abs(self.slope) + np.abs(self.act)),
                }
            weighted = np.abs(dy * self.xhat * (self.act if self.is_last else 1))
            rows = tuple(range(x.ndim - 1))
            terms["grad_weight"] = weighted.sum(rows) if rows else weighted
            alone = judged.all(rows) if rows else judged
        for name, got in results.items():
            want = exact(wants[name])
            bits = FORMATS[got.dtype][0]
            relative = 40 * self.slack + LONG(2) ** (1 - bits)
            if self.cast:
                relative = relative + LONG(2) ** (1 - FORMATS[self.x.dtype][0])
            if name == "grad_weight":
                count = np.prod([x.shape[i] for i in rows], dtype=int) if rows else 1
                relative = relative + min(count, ADDITIONS[self.computed]) * self.slack
            with np.errstate(all="ignore"):
                error = np.abs(exact(got) - want)
                bound = relative * (np.abs(want) + terms[name]) + quantum(want, got.dtype) + 1e-30
                most = LONG(2) ** (FORMATS[got.dtype][2] - 1)
                skipped = ~(alone if name == "grad_weight" else judged) | (np.abs(want) > most)
            good = (error <= bound) | skipped
            at = None if good.all() else tuple(int(i) for i in np.argwhere(~good)[0])
            assert at is None, (
                f"{(~good).sum()} of {good.size} of {name} are wrong: at {at} {exact(got)[at]!r}, "
                f"which is not {want[at]!r} within {bound[at]!r}"
            )


def check_codes(codes, scale, norm, dtype, given=None, block=None, scale_ub=None):
    """`codes` and `scale` are the norm in 8 bits, to the bit: see Quant in csrc/rmsnorm.h."""
    most = np.float32({torch.int8: 127, torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344}[dtype])
    y = norm.float().numpy()
    is_int8 = dtype == torch.int8
    with np.errstate(all="ignore"):
        if given is None:
            groups = y.reshape(*y.shape[:-1], -1, block or y.shape[-1])
            largest = np.abs(groups).max(-1)
            if scale_ub is not None:
                bounded = np.where(largest > np.float32(scale_ub), np.float32(scale_ub), largest)
                largest = bounded
            least = np.float32(2.0**-23) if is_int8 else np.float32(1) / (np.float32(512) * most)
            want = largest / most
            want = np.where(want < least, least, want)
            got = scale.numpy()
            same = (got == want) | (np.isnan(got) & np.isnan(want))
            assert same.all(), (got[~same][:3], want[~same][:3])
            s = np.repeat(want, block or y.shape[-1], -1)
        else:
            s = np.float32(given.item())
        q = y * (np.float32(1) / s) if is_int8 or given is not None else y / s
        nan = np.isnan(q)
        if is_int8:
            want = np.where(nan, 0, np.rint(np.clip(q, -128, 127)))
            same = codes.numpy() == want
        else:
            got = codes.float().numpy()
            want = rounded(np.where(nan, 0, np.clip(q, -most, most)).astype(LONG), dtype)
            same = np.where(nan, np.isnan(got), got == want)
    assert same.all(), f"{(~same).sum()} of {same.size} codes are wrong"


def unrounded_dtype(arguments):
    """The residual's dtype, where the norm is of a sum that has not been rounded to it."""
    if arguments.get("round_sum", True) or "residual" not in arguments:
        return None
    dtype = arguments["residual"].dtype
    return dtype if dtype in SIXTEEN_BIT else None


def sum_of(input, residual):
    """The sum as a fused op keeps it: in fp32 (fp64 of fp64), then in the residual's dtype."""
    compute = compute_dtype(input)
    kind = np.float64 if compute == torch.float64 else np.float32
    with np.errstate(all="ignore"):
        total = exact(input).astype(kind) + exact(residual).astype(kind)
    return rounded(total.astype(LONG), residual.dtype)
