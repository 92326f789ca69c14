/* One view of one picture on a CPU: everything behind the crop in two or three passes over memory that stays
 * in the cache. The formulas, and their order of operations, are those of color.py and blur.py.
 *
 * Plain C without a library behind it; native.py compiles and calls it. Loops over a row have no branches, so
 * that the compiler turns them into vector code.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    float brightness, contrast, saturation, hue; /* 1, 1, 1, 0 change nothing */
    int32_t flip, grey, solarize;
    int32_t radius;       /* of the blur, in pixels; 0 for none */
    const float *weights; /* at distances 0 ... radius */
} Parameters;

static inline float unit(float x) { return x < 0.0f ? 0.0f : (x > 1.0f ? 1.0f : x); }

static inline float luma(float r, float g, float b) { return 0.2989f * r + 0.587f * g + 0.114f * b; }

static inline float blend(float x, float other, float factor) { return unit(factor * x + (1.0f - factor) * other); }

static void reverse(float *row, int64_t length) {
    for (int64_t x = 0; x < length / 2; x++) {
        const float kept = row[x];
        row[x] = row[length - 1 - x];
        row[length - 1 - x] = kept;
    }
}

/* Interleaved bytes to planes in [0, 1], mirrored where asked. */
static void spread(const uint8_t *in, int64_t side, int flip, float *out) {
    const int64_t plane = side * side;
    for (int64_t y = 0; y < side; y++) {
        const uint8_t *row = in + 3 * side * y;
        float *restrict r = out + side * y, *restrict g = r + plane, *restrict b = g + plane;
        for (int64_t x = 0; x < side; x++) {
            r[x] = row[3 * x] / 255.0f, g[x] = row[3 * x + 1] / 255.0f, b[x] = row[3 * x + 2] / 255.0f;
        }
        if (flip) reverse(r, side), reverse(g, side), reverse(b, side);
    }
}

/* Scale by `factor`, and return the mean grey of the result. Sixteen sums side by side, in a fixed order. */
static float brighten(float *image, int64_t plane, float factor) {
    float *restrict r = image, *restrict g = image + plane, *restrict b = image + 2 * plane;
    double total = 0.0;
    for (int64_t begin = 0; begin < plane; begin += 4096) {
        const int64_t end = begin + 4096 < plane ? begin + 4096 : plane;
        float sums[16] = {0};
        int64_t i = begin;
        for (; i + 16 <= end; i += 16) {
            for (int lane = 0; lane < 16; lane++) {
                r[i + lane] = unit(r[i + lane] * factor);
                g[i + lane] = unit(g[i + lane] * factor);
                b[i + lane] = unit(b[i + lane] * factor);
                sums[lane] += luma(r[i + lane], g[i + lane], b[i + lane]);
            }
        }
        for (; i < end; i++) {
            r[i] = unit(r[i] * factor), g[i] = unit(g[i] * factor), b[i] = unit(b[i] * factor);
            sums[0] += luma(r[i], g[i], b[i]);
        }
        for (int lane = 0; lane < 16; lane++) total += sums[lane];
    }
    return (float)(total / (double)plane);
}

/* One channel of a colour at `place` on the colour circle, in [0, 6): see adjust_hue in color.py. */
static inline float channel(float place, float offset, float top, float chroma) {
    float phase = place + offset;
    phase = phase >= 6.0f ? phase - 6.0f : phase;
    const float fall = phase < 4.0f - phase ? phase : 4.0f - phase;
    return top - chroma * unit(fall);
}

static void jitter(float *image, int64_t plane, const Parameters *p) {
    float *restrict r = image, *restrict g = image + plane, *restrict b = image + 2 * plane;
    const float mean = brighten(image, plane, p->brightness);
    const float contrast = p->contrast, saturation = p->saturation, shift = 6.0f * p->hue;
    const int turn = p->hue != 0.0f;
    for (int64_t i = 0; i < plane; i++) {
        float red = blend(r[i], mean, contrast), green = blend(g[i], mean, contrast), blue = blend(b[i], mean, contrast);
        const float grey = luma(red, green, blue);
        red = blend(red, grey, saturation), green = blend(green, grey, saturation), blue = blend(blue, grey, saturation);
        const float larger = red > green ? red : green, smaller = red < green ? red : green;
        const float top = larger > blue ? larger : blue, bottom = smaller < blue ? smaller : blue;
        const float chroma = top - bottom, inverse = 1.0f / (chroma > 0.0f ? chroma : 1.0f);
        const float on_green = 2.0f + (blue - red) * inverse, on_blue = 4.0f + (red - green) * inverse;
        const float elsewhere = top == green ? on_green : on_blue;
        const float turned = (top == red ? (green - blue) * inverse : elsewhere) + shift;
        const float place = turned - 6.0f * floorf(turned * (1.0f / 6.0f));
        const float new_red = channel(place, 5.0f, top, chroma);
        const float new_green = channel(place, 3.0f, top, chroma);
        const float new_blue = channel(place, 1.0f, top, chroma);
        r[i] = turn ? new_red : red, g[i] = turn ? new_green : green, b[i] = turn ? new_blue : blue;
    }
}

static void make_grey(float *image, int64_t plane) {
    float *restrict r = image, *restrict g = image + plane, *restrict b = image + 2 * plane;
    for (int64_t i = 0; i < plane; i++) r[i] = g[i] = b[i] = luma(r[i], g[i], b[i]);
}

static inline int64_t reflect(int64_t i, int64_t length) {
    if (length == 1) return 0;
    const int64_t period = 2 * (length - 1);
    i = (i % period + period) % period;
    return i < length ? i : period - i;
}

/* Sixteen numbers at any address; compilers without registers of that width use several. */
typedef float lanes __attribute__((vector_size(64)));

static inline lanes load(const float *from) {
    lanes value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline void store(float *to, lanes value) { memcpy(to, &value, sizeof value); }

/* out[x] = sum of weights[k] * (rows[-k][x] + rows[k][x]) over distances k; `rows` points at the middle one.
 * Sums stay in registers; each is added up in the same order, whichever loop it falls into. */
static void weigh(const float *const *rows, const Parameters *p, int64_t length, float *restrict out) {
    const float *w = p->weights;
    const int64_t radius = p->radius;
    int64_t x = 0;
    for (; x + 64 <= length; x += 64) {
        const float *at = rows[0] + x;
        lanes a = w[0] * load(at), b = w[0] * load(at + 16), c = w[0] * load(at + 32), d = w[0] * load(at + 48);
        for (int64_t k = 1; k <= radius; k++) {
            const float *low = rows[-k] + x, *high = rows[k] + x;
            a += w[k] * (load(low) + load(high));
            b += w[k] * (load(low + 16) + load(high + 16));
            c += w[k] * (load(low + 32) + load(high + 32));
            d += w[k] * (load(low + 48) + load(high + 48));
        }
        store(out + x, a), store(out + x + 16, b), store(out + x + 32, c), store(out + x + 48, d);
    }
    for (; x + 16 <= length; x += 16) {
        lanes a = w[0] * load(rows[0] + x);
        for (int64_t k = 1; k <= radius; k++) a += w[k] * (load(rows[-k] + x) + load(rows[k] + x));
        store(out + x, a);
    }
    for (; x < length; x++) {
        float sum = w[0] * rows[0][x];
        for (int64_t k = 1; k <= radius; k++) sum += w[k] * (rows[-k][x] + rows[k][x]);
        out[x] = sum;
    }
}

/* `line` has room for side + 2 * radius numbers, `rows` for 2 * radius + 1 pointers. */
static void blur(float *image, int64_t side, const Parameters *p, float *copy, float *line, const float **rows) {
    const int64_t radius = p->radius, plane = side * side;
    for (int c = 0; c < 3; c++) {
        float *from = image + c * plane;
        for (int64_t y = 0; y < side; y++) {
            memcpy(line + radius, from + side * y, (size_t)side * sizeof(float));
            for (int64_t k = 0; k < radius; k++) {
                line[radius - 1 - k] = from[side * y + reflect(-1 - k, side)];
                line[radius + side + k] = from[side * y + reflect(side + k, side)];
            }
            for (int64_t k = 0; k <= 2 * radius; k++) rows[k] = line + k;
            weigh(rows + radius, p, side, copy + side * y);
        }
        for (int64_t y = 0; y < side; y++) {
            for (int64_t k = -radius; k <= radius; k++) rows[k + radius] = copy + side * reflect(y + k, side);
            weigh(rows + radius, p, side, from + side * y);
        }
    }
}

static void finish(float *image, int64_t plane, int solarize, const float *mean, const float *std) {
    for (int c = 0; c < 3; c++) {
        float *x = image + c * plane;
        const float shift = mean[c], scale = std[c];
        if (solarize) {
            for (int64_t i = 0; i < plane; i++) x[i] = ((x[i] >= 0.5f ? 1.0f - x[i] : x[i]) - shift) / scale;
        } else {
            for (int64_t i = 0; i < plane; i++) x[i] = (x[i] - shift) / scale;
        }
    }
}

/* The box (top, left, height, width) of one picture of bytes, as interleaved pixels. Strides are in bytes. */
void headwater_cut(const uint8_t *picture, int64_t channel, int64_t row, int64_t column, const int64_t *box,
                   uint8_t *restrict out) {
    const int64_t height = box[2], width = box[3];
    for (int64_t y = 0; y < height; y++) {
        const uint8_t *in = picture + row * (box[0] + y) + column * box[1];
        uint8_t *line = out + 3 * width * y;
        if (channel == 1 && column == 3) {
            memcpy(line, in, (size_t)(3 * width));
        } else if (column == 1) {
            for (int64_t x = 0; x < width; x++) {
                line[3 * x] = in[x], line[3 * x + 1] = in[channel + x], line[3 * x + 2] = in[2 * channel + x];
            }
        } else {
            for (int64_t x = 0; x < width; x++) {
                for (int64_t c = 0; c < 3; c++) line[3 * x + c] = in[channel * c + column * x];
            }
        }
    }
}

/* strengths (count, 4): brightness, contrast, saturation, hue; flags (count, 3): flip, grey, solarize;
 * weights (count, reach + 1) of the blur; out (count, 3, side, side) is read instead of `bytes` (count, side,
 * side, 3) where that is null, and then not mirrored; scratch holds side * side + side + 2 * reach floats and
 * rows 2 * reach + 1 pointers. */
void headwater_render(const uint8_t *bytes, float *out, int64_t count, int64_t side, const float *strengths,
                      const uint8_t *flags, const float *weights, int64_t reach, const float *mean, const float *std,
                      float *scratch, const float **rows) {
    const int64_t plane = side * side;
    for (int64_t n = 0; n < count; n++) {
        const float *s = strengths + 4 * n;
        const uint8_t *f = flags + 3 * n;
        Parameters p = {s[0], s[1], s[2], s[3], f[0], f[1], f[2], 0, weights + (reach + 1) * n};
        for (int64_t k = 1; k <= reach && p.weights[k] >= 1e-6f; k++) p.radius = (int32_t)k;
        float *image = out + 3 * plane * n;
        if (bytes) spread(bytes + 3 * plane * n, side, p.flip, image);
        if (s[0] != 1.0f || s[1] != 1.0f || s[2] != 1.0f || s[3] != 0.0f) jitter(image, plane, &p);
        if (p.grey) make_grey(image, plane);
        if (p.radius) blur(image, side, &p, scratch, scratch + plane, rows);
        finish(image, plane, p.solarize, mean, std);
    }
}
