# SPDX-License-Identifier: Apache-2.0
"""The official network's attentions as Triton kernels: no score ever goes to memory.

`folded` has the mathematics. A pixel keeps f (64 channels) and r = rstd; here r stays outside of
the products, so that positions are added at full precision: S = r (f . g + A(y) + B(x)), in units
of log 2. Every kernel adds up in float32, whatever its inputs are, and none needs sizes that are
multiples of its blocks. `launch` calls them.
"""
import triton
import triton.language as tl

CONTENT = tl.constexpr(64)      # channels f of a pixel
TOKEN = tl.constexpr(322)       # channels of a token, and of what the decoder reads
MAIN = tl.constexpr(256)        # they are 256 + 64 + 2: widths are powers of two,
REST = tl.constexpr(64)
LAST = tl.constexpr(16)         # the last two in a block of 16, then a 1 (its sum: divisor)
VALUE = tl.constexpr(336)       # = 256 + 64 + 16, the stride of what is read
HIDDEN = tl.constexpr(384)      # the decoder's hidden layer, 322 in blocks of 64


@triton.jit
def product(a, b, c, PRECISION: tl.constexpr):
    """Give a b + c. In the interpreter, which cannot multiply bfloat16, halves are widened."""
    if PRECISION == 'ieee':
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


INTERPRETED = not isinstance(product, triton.JITFunction)      # TRITON_INTERPRET=1


@triton.jit
def preprocess_kernel(frames, corners, weight, bias, sums, squares, pixels, rstd,
                      image_height, image_width, tile_stride, height, width,
                      BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Frames -> f, r. Program: BLOCK pixels of a row of a tile.

    Around a tile there are zeros (after normalising); where the image ends inside it, its last
    row and column go on.
    """
    y, tile = tl.program_id(1), tl.program_id(2)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, 64)                                    # (frame, ky, kx, channel), 54 of them
    frame, ky, kx, channel = k // 27, k % 27 // 9, k % 9 // 3, k % 3
    row, column = y + ky - 1, x[:, None] + kx[None, :] - 1
    inside = ((k < 54) & (row >= 0) & (row < height))[None, :] & (column >= 0) & (column < width)
    row = tl.minimum(row + tl.load(corners + 2 * tile), image_height - 1)
    column = tl.minimum(column + tl.load(corners + 2 * tile + 1), image_width - 1)
    at = ((frame * image_height + row) * 3 * image_width + channel)[None, :] + 3 * column
    value = tl.load(frames + tile * tile_stride + at, mask=inside, other=0).to(tl.float32)
    patch = tl.where(inside, 2 * value - 255, 0.)           # `weight` has the 1 / 255

    c = tl.arange(0, CONTENT)
    w = tl.load(weight + k[:, None] * CONTENT + c[None, :])
    f = tl.dot(patch, w, input_precision=PRECISION) + tl.load(bias + c)[None, :]
    valid = x < width
    mean = (tl.sum(f, 1) + tl.load(sums + y * width + x, mask=valid, other=0.)) / TOKEN
    square = tl.sum(f * f, 1) + tl.load(squares + y * width + x, mask=valid, other=0.)
    r = 1 / tl.sqrt(square / TOKEN - mean * mean + 1e-5)
    n = (tile * height + y) * width + x
    tl.store(pixels + n[:, None] * CONTENT + c[None, :], f.to(pixels.dtype.element_ty),
             mask=valid[:, None])
    tl.store(rstd + n, r, mask=valid)


@triton.jit
def read_kernel(pixels, rstd, content, rows, columns,
                part_top, part_total, part_content, part_column, row_top, row_sum,
                latents, height, width, splits, row_blocks,
                BLOCK_L: tl.constexpr, BLOCK_X: tl.constexpr, PRECISION: tl.constexpr):
    """Encode: softmax over all pixels, in parts. Program: latents x stripe of columns x rows.

    Walks down a stripe with B(x) and the columns' sums of p r in registers. Each row's sum is
    stored beside the maximum it refers to; everything else refers to the part's last maximum.
    """
    lat = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    stripe, stripes = tl.program_id(1), tl.num_programs(1)
    tile, split = tl.program_id(2) // splits, tl.program_id(2) % splits
    x = stripe * BLOCK_X + tl.arange(0, BLOCK_X)
    c = tl.arange(0, CONTENT)
    there, valid = lat < latents, x < width
    g = tl.load(content + lat[:, None] * CONTENT + c[None, :], mask=there[:, None], other=0.)
    b = tl.load(columns + lat[:, None] * width + x[None, :], mask=there[:, None] & valid[None, :],
                other=0.)
    b = tl.where(valid[None, :], b, float('-inf'))

    top = tl.full([BLOCK_L], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    by_content = tl.zeros([BLOCK_L, CONTENT], tl.float32)
    by_column = tl.zeros([BLOCK_L, BLOCK_X], tl.float32)
    for y in range(split * row_blocks, tl.minimum((split + 1) * row_blocks, height)):
        n = (tile * height + y) * width + x
        f = tl.load(pixels + n[:, None] * CONTENT + c[None, :], mask=valid[:, None], other=0.)
        r = tl.load(rstd + n, mask=valid, other=1.)
        a = tl.load(rows + y * latents + lat, mask=there, other=0.)
        s = product(g, tl.trans(f), b, PRECISION)
        s = (s + a[:, None]) * r[None, :]
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        scale = tl.exp2(top - higher)
        total = total * scale + tl.sum(p, 1)
        p *= r[None, :]
        by_column = by_column * scale[:, None] + p
        by_content = product(p.to(f.dtype), f, by_content * scale[:, None], PRECISION)
        at = ((tile * stripes + stripe) * height + y) * latents + lat
        tl.store(row_top + at, higher, mask=there)
        tl.store(row_sum + at, tl.sum(p, 1), mask=there)
        top = higher

    part = ((tile * splits + split) * stripes + stripe) * latents + lat
    tl.store(part_top + part, top, mask=there)
    tl.store(part_total + part, total, mask=there)
    tl.store(part_content + part[:, None] * CONTENT + c[None, :], by_content, mask=there[:, None])
    at = (tile * splits + split) * latents + lat
    tl.store(part_column + at[:, None] * width + x[None, :], by_column,
             mask=there[:, None] & valid[None, :])


@triton.jit
def combine_kernel(part_top, part_total, part_content, part_column, row_top, row_sum, out,
                   latents, height, width, splits, stripes,
                   BLOCK_L: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK: tl.constexpr):
    """Parts -> softmax's means [p r f, row sums, column sums] of each latent.

    Program: latents x (the content, or BLOCK rows, or BLOCK columns).
    """
    lat = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    chunk, tile = tl.program_id(1), tl.program_id(2)
    there = lat < latents
    parts = tile * splits * stripes * latents + lat
    top = tl.full([BLOCK_L], float('-inf'), tl.float32)
    for part in range(splits * stripes):
        top = tl.maximum(top, tl.load(part_top + parts + part * latents, mask=there, other=0.))
    divisor = tl.zeros([BLOCK_L], tl.float32)
    for part in range(splits * stripes):
        scale = tl.exp2(tl.load(part_top + parts + part * latents, mask=there, other=0.) - top)
        divisor += scale * tl.load(part_total + parts + part * latents, mask=there, other=1.)

    c = tl.arange(0, CONTENT)
    i = tl.arange(0, BLOCK)
    row_chunks = tl.cdiv(height, BLOCK)
    to = out + (tile * latents + lat[:, None]) * (height + width + CONTENT)
    if chunk == 0:
        sums = tl.zeros([BLOCK_L, CONTENT], tl.float32)
        for part in range(splits * stripes):
            at = parts + part * latents
            scale = tl.exp2(tl.load(part_top + at, mask=there, other=0.) - top)
            sums += scale[:, None] * tl.load(part_content + at[:, None] * CONTENT + c[None, :],
                                             mask=there[:, None], other=0.)
        sums /= divisor[:, None]
        tl.store(to + c[None, :], sums.to(out.dtype.element_ty), mask=there[:, None])
    elif chunk <= row_chunks:
        y = (chunk - 1) * BLOCK + i
        mask = there[:, None] & (y < height)[None, :]
        sums = tl.zeros([BLOCK_L, BLOCK], tl.float32)
        for stripe in range(stripes):
            at = ((tile * stripes + stripe) * height + y[None, :]) * latents + lat[:, None]
            scale = tl.exp2(tl.load(row_top + at, mask=mask, other=0.) - top[:, None])
            sums += scale * tl.load(row_sum + at, mask=mask, other=0.)
        sums /= divisor[:, None]
        tl.store(to + y[None, :] + CONTENT, sums.to(out.dtype.element_ty), mask=mask)
    else:
        x = (chunk - 1 - row_chunks) * BLOCK + i
        mask = there[:, None] & (x < width)[None, :]
        sums = tl.zeros([BLOCK_L, BLOCK], tl.float32)
        for split in range(splits):
            part_of_x = (tile * splits + split) * stripes + x[None, :] // BLOCK_X
            at = part_of_x * latents + lat[:, None]
            scale = tl.exp2(tl.load(part_top + at, mask=mask, other=0.) - top[:, None])
            at = (tile * splits + split) * latents + lat[:, None]
            sums += scale * tl.load(part_column + at * width + x[None, :], mask=mask, other=0.)
        sums /= divisor[:, None]
        tl.store(to + height + x[None, :] + CONTENT, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def attend_kernel(qkv, out, latents, heads, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr,
                  BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr):
    """Process: latents attend to each other. Program: BLOCK_Q of them, for one head of a tile.

    EVEN: there are a multiple of BLOCK_K of them.
    """
    tile, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    i, k, c = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, WIDTH)
    i += tl.program_id(0) * BLOCK_Q
    step = 3 * heads * WIDTH
    q_at = qkv + tile * latents * step + head * WIDTH + c[None, :]
    k_at, v_at = q_at + heads * WIDTH, q_at + 2 * heads * WIDTH
    q = tl.load(q_at + i[:, None] * step, mask=(i < latents)[:, None], other=0.)
    top = tl.full([BLOCK_Q], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    o = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
    for start in range(0, latents, BLOCK_K):
        n = start + k[:, None]
        if EVEN:
            keys, values = tl.load(k_at + n * step), tl.load(v_at + n * step)
        else:
            keys = tl.load(k_at + n * step, mask=n < latents, other=0.)
            values = tl.load(v_at + n * step, mask=n < latents, other=0.)
        s = product(q, tl.trans(keys), tl.zeros([BLOCK_Q, BLOCK_K], tl.float32), PRECISION)
        if not EVEN:
            s = tl.where((start + k < latents)[None, :], s, float('-inf'))
        higher = tl.maximum(top, tl.max(s, 1))
        scale = tl.exp2(top - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * scale + tl.sum(p, 1)
        o = product(p.to(q.dtype), values, o * scale[:, None], PRECISION)
        top = higher
    o /= total[:, None]
    at = ((tile * latents + i[:, None]) * heads + head) * WIDTH + c[None, :]
    tl.store(out + at, o.to(out.dtype.element_ty), mask=(i < latents)[:, None])


@triton.jit
def add_norm_kernel(z, y, gamma, beta, x, channels, BLOCK: tl.constexpr):
    """Do z += y (float32), x = LayerNorm(z). Program: a latent."""
    c = tl.arange(0, BLOCK)
    valid = c < channels
    at = tl.program_id(0) * channels + c
    value = tl.load(z + at, mask=valid, other=0.)
    value += tl.load(y + at, mask=valid, other=0.).to(tl.float32)
    tl.store(z + at, value, mask=valid)
    centred = tl.where(valid, value - tl.sum(value, 0) / channels, 0.)
    centred /= tl.sqrt(tl.sum(centred * centred, 0) / channels + 1e-5)
    scaled = centred * tl.load(gamma + c, mask=valid, other=0.)
    scaled += tl.load(beta + c, mask=valid, other=0.)
    tl.store(x + at, scaled.to(x.dtype.element_ty), mask=valid)


@triton.jit
def write_kernel(pixels, rstd, keys, exact, values, ys, xs, dense, dense_bias, flow, hidden_flow,
                 bias, out, latents, height, width, rows, columns,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr, GRID: tl.constexpr,
                 SPLIT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
                 PRECISION: tl.constexpr):
    """Decode: flow of pixels (ys, xs), all the way. Program: ROWS x COLUMNS queries.

    GRID: queries are all pairs of `rows` ys and `columns` xs, so a program has few rows and
    columns: C(y) and D(x) come from one more product, with ones where they belong, in SPLIT as
    the sum of two numbers of half precision. Otherwise query i is (ys[i], xs[i]), `rows` of them.
    A negative y or x stands for no query; its flow is not written.
    """
    tile = tl.program_id(1)
    dtype: tl.constexpr = pixels.dtype.element_ty
    i = tl.arange(0, ROWS * COLUMNS)
    c = tl.arange(0, CONTENT)
    if GRID:
        across = tl.cdiv(columns, COLUMNS)
        first, left = tl.program_id(0) // across * ROWS, tl.program_id(0) % across * COLUMNS
        i_y, i_x = first + i // COLUMNS, left + i % COLUMNS
        asked = (i_y < rows) & (i_x < columns)
        y = tl.load(ys + tile * rows + i_y, mask=i_y < rows, other=-1)
        x = tl.load(xs + tile * columns + i_x, mask=i_x < columns, other=-1)
        to = (tile * rows + i_y) * columns + i_x
        # Rows of `keys` with C and D of this program's rows and columns, and which query has which
        near: tl.constexpr = ROWS + COLUMNS
        k = tl.arange(0, 64 if SPLIT else 32)
        j = k % near
        k_y = tl.load(ys + tile * rows + tl.minimum(first + j, rows - 1))
        k_x = tl.load(xs + tile * columns
                      + tl.minimum(left + tl.maximum(j - ROWS, 0), columns - 1))
        place = tl.where(j < ROWS, tl.maximum(k_y, 0), height + tl.maximum(k_x, 0))
        used = k < (2 * near if SPLIT else near)
        place = tl.where(used, place + CONTENT + k // near * (height + width), 0)
        mine = (j[None, :] == i[:, None] // COLUMNS) | (j[None, :] == ROWS + i[:, None] % COLUMNS)
        ones = tl.where(mine & used[None, :], 1., 0.).to(dtype)
    else:
        at = tl.program_id(0) * ROWS * COLUMNS + i
        asked = at < rows
        y = tl.load(ys + tile * rows + at, mask=asked, other=-1)
        x = tl.load(xs + tile * rows + at, mask=asked, other=-1)
        to = tile * rows + at
    asked &= (y >= 0) & (x >= 0)
    y, x = tl.maximum(y, 0), tl.maximum(x, 0)
    n = (tile * height + y) * width + x
    f = tl.load(pixels + n[:, None] * CONTENT + c[None, :])
    r = tl.load(rstd + n)

    key_rows = (height + width) * (2 if SPLIT else 1) + CONTENT + (0 if SPLIT else 1)
    keys += tile * key_rows * latents
    exact += tile * (height + width + CONTENT + 1) * latents
    v0, v1, v2 = tl.arange(0, MAIN), tl.arange(0, REST) + MAIN, tl.arange(0, LAST) + (MAIN + REST)
    top = tl.full([ROWS * COLUMNS], float('-inf'), tl.float32)
    o0 = tl.zeros([ROWS * COLUMNS, MAIN], tl.float32)
    o1 = tl.zeros([ROWS * COLUMNS, REST], tl.float32)
    o2 = tl.zeros([ROWS * COLUMNS, LAST], tl.float32)
    for start in range(0, latents, BLOCK_L):
        lat = start + tl.arange(0, BLOCK_L)
        there = lat < latents
        key = tl.load(keys + c[:, None] * latents + lat[None, :], mask=there[None, :], other=0.)
        s = tl.zeros([ROWS * COLUMNS, BLOCK_L], tl.float32)
        s = product(f, key, s, PRECISION)
        if GRID:
            key = tl.load(keys + place[:, None] * latents + lat[None, :], mask=there[None, :],
                          other=0.)
            s = product(ones, key, s, PRECISION)
        else:
            position = exact + latents * CONTENT + lat[None, :]
            s += tl.load(position + y[:, None] * latents, mask=there[None, :], other=0.)
            s += tl.load(position + (height + x[:, None]) * latents, mask=there[None, :], other=0.)
        e = tl.load(exact + (height + width + CONTENT) * latents + lat, mask=there,
                    other=float('-inf'))
        s = s * r[:, None] + e[None, :]
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None]).to(dtype)
        scale = tl.exp2(top - higher)[:, None]
        top = higher
        v = values + (tile * latents + lat[:, None]) * VALUE
        there = there[:, None]
        o0 = product(p, tl.load(v + v0[None, :], mask=there, other=0.), o0 * scale, PRECISION)
        o1 = product(p, tl.load(v + v1[None, :], mask=there, other=0.), o1 * scale, PRECISION)
        o2 = product(p, tl.load(v + v2[None, :], mask=there, other=0.), o2 * scale, PRECISION)

    # Divide, LayerNorm (its weights are in `dense`), then MLP and last layer
    real = (v2 < TOKEN)[None, :]
    divisor = tl.sum(tl.where((v2 == TOKEN)[None, :], o2, 0.), 1)[:, None]
    o0, o1, o2 = o0 / divisor, o1 / divisor, tl.where(real, o2 / divisor, 0.)
    u = (tl.sum(o0 * tl.load(flow + v0)[None, :], 1) + tl.sum(o1 * tl.load(flow + v1)[None, :], 1)
         + tl.sum(o2 * tl.load(flow + v2)[None, :], 1) + tl.load(bias))
    v = (tl.sum(o0 * tl.load(flow + v0 + VALUE)[None, :], 1)
         + tl.sum(o1 * tl.load(flow + v1 + VALUE)[None, :], 1)
         + tl.sum(o2 * tl.load(flow + v2 + VALUE)[None, :], 1) + tl.load(bias + 1))
    mean = ((tl.sum(o0, 1) + tl.sum(o1, 1) + tl.sum(o2, 1)) / TOKEN)[:, None]
    o0, o1, o2 = o0 - mean, o1 - mean, tl.where(real, o2 - mean, 0.)
    square = tl.sum(o0 * o0, 1) + tl.sum(o1 * o1, 1) + tl.sum(o2 * o2, 1)
    scale = 1 / tl.sqrt(square / TOKEN + 1e-5)[:, None]
    x0, x1, x2 = (o0 * scale).to(dtype), (o1 * scale).to(dtype), (o2 * scale).to(dtype)
    for start in tl.range(0, HIDDEN, BLOCK_H, num_stages=1):
        h = start + tl.arange(0, BLOCK_H)
        w = dense + h[None, :]
        hidden = tl.zeros([ROWS * COLUMNS, BLOCK_H], tl.float32) + tl.load(dense_bias + h)[None, :]
        hidden = product(x0, tl.load(w + v0[:, None] * HIDDEN), hidden, PRECISION)
        hidden = product(x1, tl.load(w + v1[:, None] * HIDDEN), hidden, PRECISION)
        hidden = product(x2, tl.load(w + v2[:, None] * HIDDEN), hidden, PRECISION)
        hidden = 0.5 * hidden * (1 + tl.erf(hidden * 0.7071067811865476))
        u += tl.sum(hidden * tl.load(hidden_flow + h)[None, :], 1)
        v += tl.sum(hidden * tl.load(hidden_flow + h + HIDDEN)[None, :], 1)
    tl.store(out + 2 * to, u, mask=asked)
    tl.store(out + 2 * to + 1, v, mask=asked)
