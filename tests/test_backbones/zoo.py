"""Small instances of every family for the contract test."""

from mmrpa.backbones import RPPVT, RPCSWin, RPDeiT, RPSwin

DIMS = dict(
    embed_dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), num_heads=(2, 2, 4, 4))

SMALL = {
    'deit': (RPDeiT,
             dict(
                 arch=dict(
                     embed_dims=16, depths=4, num_heads=2, mlp_ratios=2),
                 img_size=64,
                 num_representatives=5,
                 out_indices=(0, 1, 2, 3))),
    'pvt': (RPPVT,
            dict(
                arch=dict(DIMS, mlp_ratios=(4, 4, 2, 2)),
                img_size=64,
                num_representatives=(3, 4, 5, 5))),
    'swin': (RPSwin,
             dict(
                 arch=dict(DIMS, mlp_ratios=2),
                 window_size=3,
                 num_representatives=(3, 4, 5, 5))),
    'cswin': (RPCSWin,
              dict(
                  arch=dict(DIMS, mlp_ratios=2),
                  split_sizes=(1, 2, 3, None),
                  num_representatives=(3, 4, 5, 5))),
}


def build(family: str, **options):
    """A small backbone of ``family``; ``options`` override its defaults."""
    cls, defaults = SMALL[family]
    return cls(**{**defaults, **options})


def attentions(family: str):
    """The attentions that the family can use."""
    own = SMALL[family][0].own_attention
    return ('rp', 'dense') if own == 'dense' else ('rp', 'dense', own)
