"""What fuzzing (tests/test_fuzz) found, each as a plain call: these ended in
errors of torch or Python that did not name the argument."""

import pytest
import torch
from zoo import build

from mmrpa import layers, ops
from mmrpa.backbones import RPPVT, RPCSWin, RPDeiT, RPSwin
from mmrpa.hooks import RoutingStatsHook
from mmrpa.optim import LayerDecayOptimWrapperConstructor
from mmrpa.transfer import calibrate, carry_twin, start_student
from mmrpa.weights import build_arch, convert, read_checkpoint

X = torch.zeros(2, 12, 4)
MAP = torch.zeros(2, 4, 3, 5)
QKV = [torch.zeros(1, 2, 3, 4) for _ in range(3)]
ANCHORS, WEIGHT = torch.zeros(2, 5, 4), torch.zeros(3, 2, 4, 4)
ATTENTION = layers.DenseAttention(4, 2)
BACKBONE = build('pvt')
IMAGES = torch.zeros(1, 3, 64, 64)


@pytest.mark.parametrize(('call', 'error', 'message'), [
    # The operators.
    (lambda: ops.rp_attention(None, *QKV[1:], ANCHORS, WEIGHT), TypeError,
     'q must be a tensor, got NoneType'),
    (lambda: ops.rp_attention(*QKV, ANCHORS, WEIGHT, scale='x'), TypeError,
     "scale must be a number, got 'x'"),
    (lambda: ops.rp_attention(*QKV, ANCHORS, WEIGHT, scale=float('nan')),
     ValueError, 'scale must be a finite number'),
    (lambda: ops.rp_attention(*QKV, ANCHORS, WEIGHT, interact_residual='x'),
     TypeError, 'interact_residual must be True or False'),
    (lambda: ops.rp_attention_qkv(torch.zeros(1, 3, 24), ANCHORS, WEIGHT,
                                  num_heads='2'), TypeError,
     "num_heads must be an integer, got '2'"),
    (lambda: ops.rp_attention_qkv(
        torch.zeros(1, 3, 24), ANCHORS, WEIGHT, num_heads=2, hw_shape=(3, ),
        dwc_weight=torch.zeros(8, 1, 3, 3)), TypeError, 'hw_shape must be'),
    (lambda: ops.route(torch.zeros(2, 3), ANCHORS), ValueError, 'k must be'),
    (lambda: ops.route(QKV[0], torch.zeros(2, 5, 3)), ValueError,
     r'anchors must be \(2, M, 4\)'),
    (lambda: ops.gather(*QKV[:2], ANCHORS, reduction='max'), ValueError,
     "reduction must be one of .*'max'"),
    (lambda: ops.interact(QKV[0], torch.zeros(3, 4, 4)), ValueError,
     'weight must be'),
    (lambda: ops.distribute(QKV[0], QKV[1], QKV[2][:, :, :2], 1.), ValueError,
     'v_rep must be'),
    (lambda: ops.choose_impl('cuda', torch.float32, '32', 16), TypeError,
     'head_dims must be an integer'),
    # Layers and bricks.
    (lambda: layers.RPAttention('96', 3), TypeError, 'embed_dims must be'),
    (lambda: layers.RPAttention(96, 3, 16.), TypeError,
     'num_representatives must be an integer, got 16.0'),
    (lambda: layers.RPAttention(96, 3, proj_drop='x'), TypeError,
     'proj_drop must be a number'),
    (lambda: layers.RPAttention(4, 2)(X, 12), TypeError, 'hw_shape must be'),
    (lambda: layers.RPAttention(4, 2)(X.long(), (3, 4)), TypeError,
     'x must be floating point'),
    (lambda: layers.RPAttention(4, 2)(X.double(), (3, 4)), ValueError,
     'x is torch.float64 but the parameters are torch.float32'),
    (lambda: layers.SpatialReductionAttention(4, 2, 0), ValueError,
     'sr_ratio must be at least 1'),
    (lambda: layers.WindowAttention(4, 2, '7'), TypeError, 'window_size must'),
    (lambda: layers.CrossShapedWindowAttention(4, 2, 1.5), TypeError,
     'split_size must be an integer'),
    (lambda: layers.DropPath(None), TypeError, 'rate must be a number'),
    (lambda: layers.FFN(4, -1), ValueError, 'hidden_dims must be at least 1'),
    (lambda: layers.TransformerBlock(ATTENTION, 4, 0), ValueError,
     'mlp_ratio=0 leaves the FFN no hidden channels'),
    (lambda: layers.TransformerBlock(ATTENTION, 4, 2., drop_path_rate=2.),
     ValueError, r'drop_path_rate must be in \[0, 1\), got 2.0'),
    (lambda: layers.PatchEmbed(4, 8, 0), ValueError, 'stride must be'),
    (lambda: layers.PatchEmbed(3, 8, 2)(MAP), ValueError,
     r'x must be a map \(B, 3, H, W\)'),
    (lambda: layers.PatchEmbed(4, 8, 1, 4)(MAP), ValueError,
     'x is 3x5, smaller than the kernel of 4x4'),
    (lambda: layers.DropPath(torch.ones(2)), TypeError, 'rate must be'),
    (lambda: layers.PatchMerging(4, 8)(MAP[0]), ValueError, 'x must be a map'),
    (lambda: layers.PositionEmbed(4, (3, 0)), ValueError, 'hw_shape must be'),
    (lambda: layers.PositionEmbed(4, (3, 3))(X, (3, 5)), ValueError,
     'x must be .* for hw_shape'),
    # Backbones.
    (lambda: RPSwin(3), TypeError, 'arch must be a name or a dict, got 3'),
    (lambda: RPSwin(in_channels='3'), TypeError, 'in_channels must be'),
    (lambda: RPSwin(window_size=0), ValueError, 'window_size must be'),
    (lambda: RPSwin(out_indices=[0.5]), TypeError, 'out_indices must be'),
    (lambda: RPSwin(rp_cfg=dict(foo=1)), TypeError, "rp_cfg has 'foo'"),
    (lambda: RPSwin(rp_cfg=3), TypeError, 'rp_cfg must be a dict'),
    (lambda: RPSwin(norm_cfg='LN'), TypeError, 'norm_cfg must be a dict'),
    (lambda: RPSwin(norm_cfg=dict(type='BN', foo=1)), TypeError, 'norm_cfg='),
    (lambda: RPSwin(drop_path_rate=1.), ValueError, 'drop_path_rate must be'),
    (lambda: RPPVT(img_size='224'), TypeError, 'img_size must be'),
    (lambda: RPCSWin(split_sizes='1'), TypeError, 'split_sizes must be'),
    (lambda: RPDeiT(with_cls_token=None), TypeError, 'with_cls_token must be'),
    (lambda: build('pvt')(None), TypeError, 'x must be a tensor'),
    (lambda: build('pvt')(IMAGES.byte()), TypeError,
     'x must be floating point, got torch.uint8'),
    (lambda: build('pvt')(IMAGES.half()), ValueError, 'x is torch.float16'),
    # The rest.
    (lambda: RoutingStatsHook(dead_below='x'), ValueError, 'dead_below of'),
    (lambda: RoutingStatsHook(interval=True), ValueError, 'interval of'),
    (lambda: LayerDecayOptimWrapperConstructor(3), TypeError,
     'optim_wrapper_cfg must be a dict'),
    (lambda: LayerDecayOptimWrapperConstructor(
        dict(optimizer=dict(type='SGD', lr=1.)),
        dict(layer_decay_rate=0.9, custom_keys=dict(a=3))), TypeError,
     'custom_keys of paramwise_cfg must have a dict'),
    (lambda: calibrate(BACKBONE, None), TypeError, 'images must be a tensor'),
    (lambda: calibrate(BACKBONE, IMAGES, entropy='x'), TypeError, 'entropy'),
    (lambda: carry_twin(None, BACKBONE), TypeError, 'teacher must be an RP'),
    (lambda: start_student(BACKBONE, BACKBONE, IMAGES, log=BACKBONE),
     TypeError, 'log must be a function that takes a line, got RPPVT'),
    (lambda: build_arch(None), TypeError, 'name must be a string'),
    (lambda: convert(None, BACKBONE), TypeError, 'state_dict must have'),
    (lambda: convert({}, None), TypeError, 'backbone must be an RP backbone'),
    (lambda: read_checkpoint(None), TypeError, 'path must be a string'),
    (lambda: read_checkpoint('a\0b'), ValueError, 'path .* null character'),
])
def test_error_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
