"""Triton kernels. Each row of a matrix is one program; sums are in float32, in an order that does not change.

Imported on a GPU only, since Triton comes with torch for CUDA. Triton's interpreter runs them on a CPU in the tests.
"""

import triton
import triton.language as tl


@triton.jit
def norm_forward(
    x, residual, weight, out, total, scale, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # x, residual, out, total [N, width]; weight [width]; scale [N] float32
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < width
    at = row * width + i
    h = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        h += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        h = rounded.to(tl.float32)
    s = 1 / tl.sqrt(tl.sum(h * h, 0) / width + eps)
    tl.store(scale + row, s)
    n = (h * s).to(out.dtype.element_ty)  # rounded before the product, as the modules do
    w = tl.load(weight + i, mask=inside, other=0.0)
    tl.store(out + at, (n.to(tl.float32) * w.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    grad, grad_total, total, weight, scale, grad_x, grads_weight, rows, width, BLOCK: tl.constexpr
):  # grad, grad_total, total, grad_x [N, width]; grads_weight [programs, width] float32, one part for each program
    program, programs = tl.program_id(0), tl.num_programs(0)
    i = tl.arange(0, BLOCK)
    inside = i < width
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, programs):
        at = tl.cast(row, tl.int64) * width + i
        s = tl.load(scale + row)
        n = tl.load(total + at, mask=inside, other=0.0).to(tl.float32) * s
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        of_weight += g * n
        gw = g * w
        of_x = s * (gw - n * (tl.sum(gw * n, 0) / width))
        of_x += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + at, of_x.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grads_weight + program * width + i, of_weight, mask=inside)


@triton.jit
def gate_forward(gate, up, out, count, BLOCK: tl.constexpr):  # all flat, [count]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    g = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    silu = (g / (1 + tl.exp(-g))).to(out.dtype.element_ty)  # rounded before the product, as the modules do
    u = tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, (silu.to(tl.float32) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward(
    grad, gate, up, out, grad_both, width, BLOCK: tl.constexpr
):  # grad, gate, up, out [N, width]; grad_both [N, 2 width]: of gate, of up
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    at = row * width + i
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    silu = g * sigmoid
    rounded = silu.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, (rounded * u).to(out.dtype.element_ty), mask=inside)
    both = grad_both + row * 2 * width + i
    tl.store(both, (d * u * sigmoid * (1 + g - silu)).to(out.dtype.element_ty), mask=inside)
    tl.store(both + width, (d * rounded).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(x, out, heads, c1, c2, s1, s2, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    # The heads of one token: x, out [heads, 2 HALF]
    head, d = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    at = head * 2 * HALF + d
    inside = (head < heads) & (d < HALF)
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        first, second = a * c1 + b * s2, b * c2 - a * s1
    else:
        first, second = a * c1 - b * s1, b * c2 + a * s2
    tl.store(out + at, first.to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + HALF, second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    q, k, v, cos, sin, q_out, k_out, v_out, q_heads, k_heads,
    q_from, k_from, v_from, q_to, k_to, v_to,
    BACK: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """q [T, q_heads, 2 HALF] and k; cos, sin [T, 2 HALF]. Rows are `from` apart, and `to` apart in the results.

    BACK: the gradients of q and k from those of the results; v [T, k_heads, 2 HALF] is copied.
    """
    token = tl.program_id(0).to(tl.int64)
    angle = token * 2 * HALF + tl.arange(0, HALF)[None, :]
    c1, c2 = tl.load(cos + angle).to(tl.float32), tl.load(cos + angle + HALF).to(tl.float32)
    s1, s2 = tl.load(sin + angle).to(tl.float32), tl.load(sin + angle + HALF).to(tl.float32)
    _rotate(q + token * q_from, q_out + token * q_to, q_heads, c1, c2, s1, s2, BACK, Q_HEADS, HALF)
    _rotate(k + token * k_from, k_out + token * k_to, k_heads, c1, c2, s1, s2, BACK, K_HEADS, HALF)
    if BACK:
        i = tl.arange(0, K_HEADS * 2 * HALF)
        inside = i < k_heads * 2 * HALF
        copied = tl.load(v + token * v_from + i, mask=inside)
        tl.store(v_out + token * v_to + i, copied, mask=inside)


@triton.jit
def column_sum(parts, out, rows, width, BLOCK: tl.constexpr):  # parts [rows, width] float32; out [width]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows):
        total += tl.load(parts + row * width + i, mask=inside, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def log_probs(
    logits, ids, out, normalizer, vocabulary, stride, count, BLOCK: tl.constexpr, IDS: tl.constexpr
):  # logits [N, vocabulary], rows `stride` apart; ids, out [N, count]; normalizer [N] float32: logsumexp of each row
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    most = tl.full((BLOCK,), -float("inf"), tl.float32)  # of each lane
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        i = first + tl.arange(0, BLOCK)
        z = tl.load(start + i, mask=i < vocabulary, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(most, z)
        known = larger > -float("inf")
        total = tl.where(known, total * tl.exp(most - larger) + tl.exp(z - larger), 0.0)
        most = larger
    top = tl.max(most, 0)
    log_sum = top + tl.log(tl.sum(tl.where(most > -float("inf"), total * tl.exp(most - top), 0.0), 0))
    tl.store(normalizer + row, log_sum)
    j = tl.arange(0, IDS)
    wanted = j < count
    token = tl.load(ids + row * count + j, mask=wanted, other=0)
    z = tl.load(start + token, mask=wanted, other=0.0).to(tl.float32)
    tl.store(out + row * count + j, z - log_sum, mask=wanted)


@triton.jit
def softmax_gradient(
    logits, normalizer, slope, vocabulary, stride, BLOCK: tl.constexpr
):  # logits [N, vocabulary] become slope [N] times their softmax
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * stride + i
    inside = i < vocabulary
    p = tl.exp(tl.load(at, mask=inside, other=0.0).to(tl.float32) - tl.load(normalizer + row))
    tl.store(at, (p * tl.load(slope + row)).to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _log1mexp(x):
    # log(1 - exp(x)) for x < 0
    near = tl.log(-_expm1(tl.maximum(x, -0.6931)))
    far = _log1p(-tl.exp(tl.minimum(x, -0.6931)))
    return tl.where(x > -0.6931, near, far)


@triton.jit
def _expm1(x):
    # By its series near 0, where exp(x) - 1 would lose digits
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    # Exact for small x: the rounding of 1 + x is divided out
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def _inside(logprobs, inside, floor):
    # logsumexp of a row, and the same limited to -floor
    top = tl.max(tl.where(inside, logprobs, -float("inf")), 0)
    total = tl.sum(tl.where(inside, tl.exp(logprobs - top), 0.0), 0)
    log_sum = top + tl.log(total)
    return log_sum, tl.minimum(log_sum, -floor)


@triton.jit
def support(
    log_p, log_q, value, grad, count, floor, clip, REVERSE: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr
):  # log_p, log_q, grad [N, count] float32; value [N]
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < count
    at = row * count + i
    p, q = tl.load(log_p + at, mask=inside, other=0.0), tl.load(log_q + at, mask=inside, other=0.0)
    if REVERSE:
        total = tl.sum(tl.where(inside, tl.exp(p) * (p - q), 0.0), 0)
        slope = tl.exp(p) * (p - q + 1)
    else:
        total = tl.sum(tl.where(inside, tl.exp(q) * (q - p), 0.0), 0)
        slope = -tl.exp(q)
    if TAIL:
        sum_p, limited_p = _inside(p, inside, floor)
        _, limited_q = _inside(q, inside, floor)
        tail_p, tail_q = _log1mexp(limited_p), _log1mexp(limited_q)
        # d tail_p / d p_i, which is 0 where the sum was limited
        of_tail = tl.where(sum_p > -floor, 0.0, -tl.exp(limited_p - tail_p)) * tl.exp(p - sum_p)
        if REVERSE:
            total += tl.exp(tail_p) * (tail_p - tail_q)
            slope += tl.exp(tail_p) * (tail_p - tail_q + 1) * of_tail
        else:
            total += tl.exp(tail_q) * (tail_q - tail_p)
            slope -= tl.exp(tail_q) * of_tail
    tl.store(value + row, total)
    tl.store(grad + at, tl.where(total > clip, 0.0, slope), mask=inside)


@triton.jit
def adamw(
    p, grad, mean, square, teacher, count, kept, rest1, beta2, rest2, size, root, eps, alpha,
    TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # All flat, [count] float32. kept: of a weight by its decay; size, root: with the bias correction
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    g = tl.load(grad + i, mask=inside, other=0.0)
    m = tl.load(mean + i, mask=inside, other=0.0)
    m += rest1 * (g - m)
    v = tl.load(square + i, mask=inside, other=0.0) * beta2 + rest2 * g * g
    w = tl.load(p + i, mask=inside, other=0.0) * kept
    w -= size * m / (tl.sqrt(v) * root + eps)
    tl.store(mean + i, m, mask=inside)
    tl.store(square + i, v, mask=inside)
    tl.store(p + i, w, mask=inside)
    if TEACHER:
        t = tl.load(teacher + i, mask=inside, other=0.0)
        tl.store(teacher + i, t + alpha * (w - t), mask=inside)
