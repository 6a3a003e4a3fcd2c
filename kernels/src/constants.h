// Numbers that every processor path must share to give the same bits.
#pragma once

// gelu(x) = max(x, 0) - g(|x|) with g(t) = t * P(N > t), and g(t) = u * q(u) for u = 4.5 - t, 0 beyond: least largest error over
// [0, 4.5] among degree 10, found by Lawson's reweighted least squares. In fp32 the result is within 5e-5 of the exact one
// everywhere; the second row is for the tanh form.
constexpr int GELU_TERMS = 10;
constexpr float GELU_END = 4.5f;
constexpr float GELU_TERM[2][GELU_TERMS] = {
    {0.000868640898f, -0.00704038097f, 0.0253539234f, -0.0445795804f, 0.0457910039f, -0.0281643923f, 0.010693158f,
     -0.00237129978f, 0.000275706087f, -1.29140471e-05f},
    {0.000647218549f, -0.00602796813f, 0.0220795721f, -0.0391407758f, 0.0401753709f, -0.0246402677f, 0.0093814237f,
     -0.00208943337f, 0.000243411618f, -1.13858914e-05f},
};

// 2^f for |f| <= 0.5, found likewise; relative error below 2e-7 in fp32.
constexpr int EXP2_TERMS = 6;
constexpr float EXP2_TERM[EXP2_TERMS] = {1.00000012f, 0.693146944f, 0.240221202f, 0.0555071309f, 0.00967554189f, 0.00132764725f};
constexpr float EXP2_LEAST = -126.0f;
constexpr float LOG2_E = 1.44269504f;

constexpr float LEAST_SCALE = 1e-30f;  // a row whose values all lie within 255 times this is taken for zeros
