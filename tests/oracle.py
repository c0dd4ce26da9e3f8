"""RPAttention written out as loops in float64, straight from docs/method.md.

Deliberately unlike the implementation: one image, one head, one token and one
representative at a time, no batched product and no softmax call. Autograd runs
through it, so it is the oracle of values and of all gradients.
"""

import torch

EPS = 1e-6


def softmax(logits):
    """Softmax of a list of scalars."""
    top = max(x.item() for x in logits)
    exps = [torch.exp(x - top) for x in logits]
    total = sum(exps)
    return [e / total for e in exps]


def mix(weights, vectors):
    """Weighted sum of vectors."""
    return sum(w * vec for w, vec in zip(weights, vectors, strict=True))


def gather(k, v, anchors, routing='representatives', reduction='mean'):
    """One head: lists of N keys, N values and M anchors, each of d numbers."""
    logits = [[(key * a).sum() for a in anchors] for key in k]
    if routing == 'representatives':
        p = [softmax(row) for row in logits]
    else:
        columns = [softmax(list(c)) for c in zip(*logits, strict=True)]
        p = [list(row) for row in zip(*columns, strict=True)]
    k_rep, z = [], []
    for m in range(len(anchors)):
        weights = [row[m] for row in p]
        mass = sum(weights) if reduction == 'mean' else 1.
        if reduction == 'mean' and mass.item() < EPS:
            mass = EPS
        k_rep.append(mix(weights, k) / mass)
        z.append(mix(weights, v) / mass)
    return k_rep, z


def attend(queries, keys, values, scale):
    """Softmax attention of lists of vectors."""
    return [
        mix(softmax([(q * key).sum() * scale for key in keys]), values)
        for q in queries
    ]


def project(per_head, weight):
    """h lists of M vectors, times (h, d, d) or (C, C), row by row."""
    if weight.dim() == 3:
        return [[
            sum(vec[i] * w[i] for i in range(len(vec))) for vec in vecs
        ] for vecs, w in zip(per_head, weight, strict=True)]
    dims = len(per_head[0][0])
    out = [[] for _ in per_head]
    for m in range(len(per_head[0])):
        whole = torch.cat([vecs[m] for vecs in per_head])
        mixed = sum(whole[i] * weight[i] for i in range(len(whole)))
        for head in range(len(per_head)):
            out[head].append(mixed[head * dims:(head + 1) * dims])
    return out


def rp_attention(q, k, v, anchors, interact_weight, *,
                 routing='representatives', reduction='mean',
                 interact_proj=None, interact_residual=False, scale=None):
    """The whole operator on (B, h, N, d); see mmrpa.ops.rp_attention."""
    q, k, v, anchors, interact_weight = (
        t.double() for t in (q, k, v, anchors, interact_weight))
    images = []
    for b in range(q.shape[0]):
        k_reps, zs = [], []
        for h in range(q.shape[1]):
            a = anchors[h if anchors.shape[0] > 1 else 0]
            k_rep, z = gather(
                list(k[b, h]), list(v[b, h]), list(a), routing, reduction)
            k_reps.append(k_rep)
            zs.append(z)
        dims = q.shape[-1]
        projected = [project(zs, w) for w in interact_weight]
        v_reps = [
            attend(*qkv, dims**-0.5) for qkv in zip(*projected, strict=True)
        ]
        if interact_proj is not None:
            v_reps = project(v_reps, interact_proj.double())
        if interact_residual:
            v_reps = [[z + r for z, r in zip(*pair, strict=True)]
                      for pair in zip(zs, v_reps, strict=True)]
        heads = [
            torch.stack(
                attend(list(q[b, h]), k_reps[h], v_reps[h],
                       dims**-0.5 if scale is None else scale))
            for h in range(q.shape[1])
        ]
        images.append(torch.stack(heads))
    return torch.stack(images)


def depthwise(v, hw_shape, weight, bias):
    """Depth-wise convolution with zero padding, one cell at a time."""
    height, width = hw_shape
    pad = weight.shape[-1] // 2
    rows = []
    for y in range(height):
        for x in range(width):
            cell = torch.zeros_like(v[:, 0]) if bias is None else bias
            for dy in range(-pad, pad + 1):
                for dx in range(-pad, pad + 1):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        token = v[:, (y + dy) * width + x + dx]
                        cell = cell + token * weight[:, 0, dy + pad, dx + pad]
            rows.append(cell.expand_as(v[:, 0]))
    return torch.stack(rows, dim=1)


def rp_attention_qkv(qkv, anchors, interact_weight, *, num_heads,
                     hw_shape=(0, 0), dwc_weight=None, dwc_bias=None,
                     **options):
    """The operator on (B, N, 3C); see mmrpa.ops.rp_attention_qkv."""
    channels = qkv.shape[-1] // 3
    q, k, v = qkv.double().split(channels, dim=-1)
    heads = (torch.stack(t.split(channels // num_heads, dim=-1), dim=1)
             for t in (q, k, v))
    out = rp_attention(*heads, anchors, interact_weight, **options)
    out = torch.cat(list(out.unbind(1)), dim=-1)
    if dwc_weight is None:
        return out
    num_cls = qkv.shape[1] - hw_shape[0] * hw_shape[1]
    local = depthwise(v[:, num_cls:], hw_shape, dwc_weight.double(),
                      None if dwc_bias is None else dwc_bias.double())
    return torch.cat((out[:, :num_cls], out[:, num_cls:] + local), dim=1)
