"""The epilogue of every accumulation: act(scale * (conv + bias) + shift + residual), in fp32."""

import triton
import triton.language as tl


@triton.jit
def _relu(x):
    # A NaN stays one, as in torch's activations.
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamp6(x):
    return tl.minimum(_relu(x), 6.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _activate(x, negative_slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = _relu(x)
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x > 0.0, x, x * negative_slope)
    elif ACTIVATION == "relu6":
        x = _clamp6(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2u).
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    elif ACTIVATION == "hardswish":
        x = x * _clamp6(x + 3.0) * (1.0 / 6.0)
    elif ACTIVATION == "hardsigmoid":
        x = _clamp6(x + 3.0) * (1.0 / 6.0)
    return x


@triton.jit
def _affine(accumulator, bias_ptr, scale_ptr, shift_ptr, channel, channel_ok):
    # accumulator [BLOCK_M, BLOCK_N]; channel, channel_ok [BLOCK_N]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=channel_ok, other=0.0).to(tl.float32)
        accumulator += bias[None, :]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel, mask=channel_ok, other=0.0).to(tl.float32)
        accumulator *= scale[None, :]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + channel, mask=channel_ok, other=0.0).to(tl.float32)
        accumulator += shift[None, :]
    return accumulator
