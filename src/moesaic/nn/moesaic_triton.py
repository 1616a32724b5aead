"""The `moesaic` architecture: its kernels for GPUs, in Triton (see `moesaic_path_triton.py`, which alone imports this).

A load is masked by everything that its address depends on, so that no index can make it read outside a matrix: an
expert that does not exist is one that has no neurons. Sums are fp32. Blocks are powers of two, and 16 at least where
they are multiplied.

Axes: T tokens, D model width, P packed neurons, E experts, K experts per token, N pairs of a token and an expert that
it chose, sorted by expert, M neurons of one expert.
"""

from __future__ import annotations

try:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
except ImportError as error:  # the `try` tells transformers that a folder loads without Triton
    raise ImportError("the kernels for GPUs need Triton") from error


@triton.jit
def activated(v, ACTIVATION: tl.constexpr):
    """The activation of a number in ``ACTIVATIONS`` of `moesaic_kernel.py`, in fp32."""
    if ACTIVATION == 0:
        v = v * tl.sigmoid(v)
    elif ACTIVATION == 1:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == 2:
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))  # (1 + tanh z) / 2 is sigmoid 2z
    else:
        v = tl.where(v < 0, 0.0, v)
        if ACTIVATION == 4:
            v = v * v
    return v


@triton.jit
def added(y, a, b, WIDE: tl.constexpr):
    """y + a b. Of fp32 no bit is dropped. ``WIDE``: for Triton's interpreter, which cannot multiply bf16."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, y, input_precision="ieee")


@triton.jit
def neuron(gate, up, gate_bias, up_bias, row, row_ok, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """Activations of neurons ``row`` (the last axis) from their sums ``gate`` and ``up``; a bias of None is none."""
    if up_bias is not None:
        up += tl.load(up_bias + row, mask=row_ok, other=0.0).to(tl.float32)[None, :]
    if gate_bias is not None:
        gate += tl.load(gate_bias + row, mask=row_ok, other=0.0).to(tl.float32)[None, :]
    if not GATED:
        return activated(up, ACTIVATION)
    return activated(gate, ACTIVATION) * up


@triton.jit
def weigh(
    t_T, p_P, chosen, weight, member, tokens, neurons, shared, experts, width, top_k,
    UNION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """w_TP, what each neuron counts for each token: 1 if it is shared, else the weights of the experts that have it."""
    own_P = p_P - shared
    routed_P = (own_P >= 0) & (p_P < neurons)
    w_TP = tl.where((t_T < tokens)[:, None] & (p_P < shared)[None, :], 1.0, tl.zeros([BLOCK_T, BLOCK_P], tl.float32))
    for k in range(top_k):
        e_T = tl.load(chosen + t_T * top_k + k, mask=t_T < tokens, other=-1)
        has_TP = ((e_T >= 0) & (e_T < experts))[:, None] & routed_P[None, :]
        if UNION:
            place_TP = e_T[:, None] * (neurons - shared) + own_P[None, :]
            has_TP = tl.load(member + place_TP, mask=has_TP, other=0) != 0
        else:
            has_TP = has_TP & ((own_P // width)[None, :] == e_T[:, None])
        weight_T = tl.full([BLOCK_T], 1.0, tl.float32)
        if weight is not None:
            weight_T = tl.load(weight + t_T * top_k + k, mask=t_T < tokens, other=0.0).to(tl.float32)
        w_TP += tl.where(has_TP, weight_T[:, None], 0.0)
    return w_TP


@triton.jit
def rows_hidden(
    x, gate, up, gate_bias, up_bias, chosen, weight, member, h,
    tokens, d_model, neurons, shared, experts, width, top_k, gate_p, gate_d, up_p, up_d,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, UNION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """h_TP, weighed activations, fp32. Rows of gate and up that no token of the block wants are not read; 0 is left."""
    p_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    t_T = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d_D = tl.arange(0, BLOCK_D)
    w_TP = weigh(
        t_T, p_P, chosen, weight, member, tokens, neurons, shared, experts, width, top_k, UNION, BLOCK_T, BLOCK_P
    )
    wanted_P = tl.max((w_TP != 0).to(tl.int32), 0) > 0
    far_T, far_P = t_T.to(tl.int64), p_P.to(tl.int64)
    h_TP = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
    if tl.max(wanted_P.to(tl.int32), 0) > 0:
        g_TP = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
        u_TP = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
        g_PD = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        u_PD = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        for begin in range(0, d_model, BLOCK_D):
            at_D = begin + d_D
            x_TD = tl.load(
                x + far_T[:, None] * d_model + at_D[None, :],
                mask=(t_T < tokens)[:, None] & (at_D < d_model)[None, :],
                other=0.0,
            )
            ok_PD = wanted_P[:, None] & (at_D < d_model)[None, :]
            w_PD = tl.load(up + far_P[:, None] * up_p + at_D[None, :] * up_d, mask=ok_PD, other=0.0)
            if BLOCK_T == 1:
                u_PD += x_TD.to(tl.float32) * w_PD.to(tl.float32)
            else:
                u_TP = added(u_TP, x_TD, tl.trans(w_PD), WIDE)
            if GATED:
                w_PD = tl.load(gate + far_P[:, None] * gate_p + at_D[None, :] * gate_d, mask=ok_PD, other=0.0)
                if BLOCK_T == 1:
                    g_PD += x_TD.to(tl.float32) * w_PD.to(tl.float32)
                else:
                    g_TP = added(g_TP, x_TD, tl.trans(w_PD), WIDE)
        if BLOCK_T == 1:
            u_TP = tl.sum(u_PD, 1)[None, :]
            g_TP = tl.sum(g_PD, 1)[None, :]
        h_TP = neuron(g_TP, u_TP, gate_bias, up_bias, p_P, wanted_P, ACTIVATION, GATED)
        h_TP = tl.where(w_TP != 0, h_TP * w_TP, 0.0)
    tl.store(h + far_T[:, None] * neurons + p_P[None, :], h_TP, mask=(t_T < tokens)[:, None] & (p_P < neurons)[None, :])


@triton.jit
def rows_down(
    h, down, y, tokens, d_model, neurons, each, down_p, down_d,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Part s of y_STD: the neurons [s each, (s + 1) each). Columns of down whose h is 0 for all tokens are not read."""
    at_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    t_T = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    far_T = t_T.to(tl.int64)
    y_TD = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    y_PD = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for begin in range(split * each, tl.minimum(split * each + each, neurons), BLOCK_P):
        p_P = begin + tl.arange(0, BLOCK_P)
        h_TP = tl.load(
            h + far_T[:, None] * neurons + p_P[None, :],
            mask=(t_T < tokens)[:, None] & (p_P < neurons)[None, :],
            other=0.0,
        )
        wanted_P = tl.max((h_TP != 0).to(tl.int32), 0) > 0
        w_PD = tl.load(
            down + p_P.to(tl.int64)[:, None] * down_p + at_D.to(tl.int64)[None, :] * down_d,
            mask=wanted_P[:, None] & (at_D < d_model)[None, :],
            other=0.0,
        )
        if BLOCK_T == 1:
            y_PD += tl.trans(h_TP) * w_PD.to(tl.float32)
        else:
            y_TD = added(y_TD, h_TP.to(w_PD.dtype), w_PD, WIDE)
    if BLOCK_T == 1:
        y_TD = tl.sum(y_PD, 0)[None, :]
    tl.store(
        y + (split.to(tl.int64) * tokens + far_T)[:, None] * d_model + at_D[None, :],
        y_TD,
        mask=(t_T < tokens)[:, None] & (at_D < d_model)[None, :],
    )


@triton.jit
def count_of(e, width, place_of, UNION: tl.constexpr):
    """How many neurons an expert has."""
    count = width
    if UNION:
        count = tl.load(place_of + e + 1) - tl.load(place_of + e)
    return count


@triton.jit
def rows_of(e, m_M, count, shared, width, places, place_of, UNION: tl.constexpr):
    """Rows of an expert's neurons: a run, or entries of a list."""
    if UNION:
        row_M = tl.load(places + tl.load(place_of + e) + m_M, mask=m_M < count, other=0)
    else:
        row_M = shared + e * width + m_M
    return row_M.to(tl.int64)


@triton.jit
def grouped_hidden(
    x, gate, up, gate_bias, up_bias, order, weight, h, tile_expert, tile_first, tile_stop, places, place_of,
    d_model, shared, width, widest, top_k, gate_p, gate_d, up_p, up_d,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, UNION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """h_NM, weighed activations: a tile of pairs of one expert, whose tokens and neurons are found by index."""
    e = tl.load(tile_expert + tl.program_id(0))
    n_N = tl.load(tile_first + tl.program_id(0)) + tl.arange(0, BLOCK_N)
    n_ok = n_N < tl.load(tile_stop + tl.program_id(0))
    m_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = count_of(e, width, place_of, UNION)
    row_M = rows_of(e, m_M, count, shared, width, places, place_of, UNION)
    m_ok = m_M < count
    pair_N = tl.load(order + n_N, mask=n_ok, other=0)
    g_NM = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    u_NM = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if (tl.max(n_ok.to(tl.int32), 0) > 0) & (tl.program_id(1) * BLOCK_M < count):
        for begin in range(0, d_model, BLOCK_D):
            at_D = begin + tl.arange(0, BLOCK_D)
            d_ok = at_D < d_model
            x_ND = tl.load(
                x + (pair_N // top_k)[:, None] * d_model + at_D[None, :], mask=n_ok[:, None] & d_ok[None, :], other=0.0
            )
            ok_MD = m_ok[:, None] & d_ok[None, :]
            w_MD = tl.load(up + row_M[:, None] * up_p + at_D[None, :] * up_d, mask=ok_MD, other=0.0)
            u_NM = added(u_NM, x_ND, tl.trans(w_MD), WIDE)
            if GATED:
                w_MD = tl.load(gate + row_M[:, None] * gate_p + at_D[None, :] * gate_d, mask=ok_MD, other=0.0)
                g_NM = added(g_NM, x_ND, tl.trans(w_MD), WIDE)
        h_NM = neuron(g_NM, u_NM, gate_bias, up_bias, row_M, m_ok, ACTIVATION, GATED)
        if weight is not None:
            h_NM = h_NM * tl.load(weight + pair_N, mask=n_ok, other=0.0).to(tl.float32)[:, None]
        place_NM = n_N[:, None] * widest + m_M[None, :]
        tl.store(h + place_NM, h_NM.to(h.dtype.element_ty), mask=n_ok[:, None] & m_ok[None, :])


@triton.jit
def grouped_down(
    h, down, y, order, tile_expert, tile_first, tile_stop, places, place_of,
    d_model, shared, width, widest, down_p, down_d, UNION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """y_ND of each pair, at the place that it has among the tokens' choices."""
    e = tl.load(tile_expert + tl.program_id(0))
    n_N = tl.load(tile_first + tl.program_id(0)) + tl.arange(0, BLOCK_N)
    n_ok = n_N < tl.load(tile_stop + tl.program_id(0))
    at_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_ok = at_D < d_model
    if tl.max(n_ok.to(tl.int32), 0) > 0:
        y_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        count = count_of(e, width, place_of, UNION)
        for begin in range(0, count, BLOCK_M):
            m_M = begin + tl.arange(0, BLOCK_M)
            row_M = rows_of(e, m_M, count, shared, width, places, place_of, UNION)
            m_ok = m_M < count
            h_NM = tl.load(h + n_N[:, None] * widest + m_M[None, :], mask=n_ok[:, None] & m_ok[None, :], other=0.0)
            w_MD = tl.load(
                down + row_M[:, None] * down_p + at_D.to(tl.int64)[None, :] * down_d,
                mask=m_ok[:, None] & d_ok[None, :],
                other=0.0,
            )
            y_ND = added(y_ND, h_NM, w_MD, WIDE)
        pair_N = tl.load(order + n_N, mask=n_ok, other=0)
        place_ND = pair_N[:, None] * d_model + at_D[None, :]
        tl.store(y + place_ND, y_ND.to(y.dtype.element_ty), mask=n_ok[:, None] & d_ok[None, :])
