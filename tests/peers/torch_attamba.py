"""An eager PyTorch 2 peer of this trainer: Attamba and the plain transformer, written for speed and for reading.

It is what our throughput is compared with, in two variants of the same model. `plain` is what one writes from the paper: the
boolean mask goes to scaled_dot_product_attention, F.cross_entropy gets all logits, torch.optim.AdamW its defaults. `tuned` is
as fast as eager code gets without custom kernels: blocks of queries see only the keys they may attend to, logits become their
gradient in place, AdamW is fused, and freed memory is kept. Both have one matrix multiplication for query and both SSM inputs,
one for w1 and w3, and the scan inside chunks in its dual form (cumulative sums and small matrices), so `plain` is no straw man.
`--check GOLDEN.h5` proves that both are the same model.

    python torch_attamba.py --model attamba --batch 1 --sequence 1024 --steps 10 --threads 2
    python torch_attamba.py --check tests/golden/attamba_cyclic_p4_l3.h5
"""

import argparse
import contextlib
import ctypes
import json
import math
import statistics
import sys
import time

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError as missing:
    sys.exit(f"{sys.argv[0]}: needs PyTorch 2.5 or newer ({missing}): pip install torch, or name a Python that has it")

PAPER = dict(vocab_size=32000, dim=512, n_layers=8, n_heads=8, n_kv_heads=8, head_dim=64, ffn_dim=1536, norm_eps=1e-5,
             rope_theta=10000.0, tie_embeddings=False, kv_proj=False, attn_dim=512, sliding_window=0,
             ssm=dict(hidden=256, state=32, heads=8, groups=1, conv=4, dt_bias=False, residual=True),
             chunking=dict(strategy="cyclic", size=8, leading_tokens=8))


# ------------------------------------------------------------------------------------------------------------- chunks
class Chunks(nn.Module):
    """One layer's chunks of a sequence of n tokens, as a grid [chunks, width] in which short chunks are padded with zeros.

    A zero token adds nothing to a state and to a convolution, so padding in front of the first chunk is harmless.
    """

    def __init__(self, strategy, size, layer, n, ends=None):
        super().__init__()
        self.n = n
        if strategy == "explicit":
            self.ends = sorted(set(int(e) for e in ends) | {n - 1})
            starts = [0] + [e + 1 for e in self.ends[:-1]]
            self.width = max(e - s + 1 for s, e in zip(starts, self.ends))
            slots = torch.full((len(starts), self.width), n)  # n names a row of zeros
            for row, (s, e) in enumerate(zip(starts, self.ends)):
                slots[row, : e - s + 1] = torch.arange(s, e + 1)
            self.register_buffer("slots", slots.flatten(), persistent=False)
            self.register_buffer("slot_of_token", slots.flatten().argsort()[:n], persistent=False)
            return
        self.slots = None
        self.front = layer % size if strategy == "cyclic" else 0
        self.width = min(size, self.front + n)
        self.back = -(self.front + n) % self.width
        self.ends = sorted(set(range(size - 1 - self.front, n, size)) | {n - 1})

    def split(self, x):
        """[B, n, C] to [B, chunks, width, C]"""
        if self.slots is not None:
            x = F.pad(x, (0, 0, 0, 1)).index_select(1, self.slots)
        elif self.front or self.back:
            x = F.pad(x, (0, 0, self.front, self.back))
        return x.unflatten(1, (-1, self.width))

    def merge(self, x):
        """[B, chunks, width, ...] to [B, n, ...]"""
        x = x.flatten(1, 2)
        if self.slots is not None:
            return x.index_select(1, self.slot_of_token)
        return x[:, self.front : self.front + self.n]


def attamba_mask(n, chunks, leading, strategy):
    """allowed[t, k]: key k ends a chunk or is among the last `leading` tokens (0: lies in t's own chunk), docs/model.md"""
    position = torch.arange(n)
    causal = position[:, None] >= position[None, :]
    if strategy == "none":
        return causal
    ends = torch.zeros(n, dtype=torch.bool)
    ends[chunks.ends] = True
    if leading:
        recent = position[None, :] > position[:, None] - leading
    else:
        chunk = ends.cumsum(0) - ends.long()
        recent = chunk[:, None] == chunk[None, :]
    return causal & (ends[None, :] | recent)


class MaskedAttention(nn.Module):
    """Scaled dot-product attention under a fixed mask [n, n] that most keys of a query are absent from.

    `mask` hands the whole boolean mask to PyTorch, which computes all n keys of every query. `blocks` gives each block of
    queries only the keys that one of them may see (chunk ends and recent tokens), padded to the longest such list.
    """

    def __init__(self, mask, method, block=64):
        super().__init__()
        n = mask.shape[0]
        self.blocks = method == "blocks" and n % block == 0 and n > block
        if self.blocks:
            rows = mask.unflatten(0, (-1, block))  # [blocks, block, n]
            seen = rows.any(1)
            width = int(seen.sum(1).max())
            keys = seen.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
            mask = rows.gather(2, keys[:, None].expand(-1, block, -1))[:, None]  # [blocks, 1, block, width]
            self.register_buffer("keys", keys.flatten(), persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, q, k, v):
        """q [B, n, H, d], k and v [B, n, Hk, d] -> [B, n, H d]"""
        batch, shared = q.shape[0], q.shape[2] != k.shape[2]
        mask = self.mask
        if self.blocks:
            count = mask.shape[0]
            q = q.unflatten(1, (count, -1)).flatten(0, 1)
            k, v = (a.index_select(1, self.keys).unflatten(1, (count, -1)).flatten(0, 1) for a in (k, v))
            mask = mask.repeat(batch, 1, 1, 1)
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared).transpose(1, 2)
        return y.reshape(batch, -1, y.shape[2] * y.shape[3])


# ------------------------------------------------------------------------------------------------------------- layers
class Rope(nn.Module):
    """Turns the pairs (2i, 2i+1) of a head by position * theta^(-2i/d)."""

    def __init__(self, n, head_dim, theta):
        super().__init__()
        angle = torch.outer(torch.arange(n).double(), theta ** (-torch.arange(0, head_dim, 2).double() / head_dim))
        self.register_buffer("turn", torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None], persistent=False)

    def forward(self, x):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.turn).flatten(-2).to(x.dtype)


class RmsNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class SsmPair(nn.Module):
    """The selective SSMs that make keys and values (docs/model.md), side by side. Index 0 is the key's, 1 the value's.

    Rows of the input projection: z of both, xBC of both, dt of both, so that each slice is one block of channels.
    """

    def __init__(self, width, hidden, state, heads, groups, conv, dt_bias, residual):
        super().__init__()
        self.hidden, self.state, self.heads, self.groups, self.residual = hidden, state, heads, groups, residual
        self.channels = hidden + 2 * groups * state
        self.conv = nn.Parameter(torch.empty(2, self.channels, conv)) if conv else None
        self.a_log = nn.Parameter(torch.empty(2, heads))
        self.skip = nn.Parameter(torch.ones(2, heads))
        self.dt_bias = nn.Parameter(torch.zeros(2, heads)) if dt_bias else None
        self.norm = nn.Parameter(torch.ones(2, hidden))
        self.out_proj = nn.Parameter(torch.empty(2, width, hidden))

    def input_sizes(self):
        return [2 * self.hidden, 2 * self.channels, 2 * self.heads]

    def convolve(self, x):
        """Depthwise causal convolution inside each chunk, [B, chunks, width, 2 channels], then SiLU."""
        if self.conv is None:
            return x
        taps = self.conv.shape[-1]
        image = F.pad(x, (0, 0, taps - 1, 0)).permute(0, 3, 1, 2)  # channels-last: no copy
        weight = self.conv.reshape(-1, 1, 1, taps)
        return F.silu(F.conv2d(image, weight, groups=weight.shape[0]).permute(0, 2, 3, 1))

    def scan(self, xbc, dt):
        """Every position's output from its chunk's tokens up to itself: y = (C B^T * decay * delta + skip) X per head.

        xbc [B, chunks, width, 2 channels], dt [B, chunks, width, 2 heads] -> [B, chunks, width, 2, hidden]
        """
        shares = self.heads // self.groups
        x, b, c = xbc.unflatten(-1, (2, -1)).split([self.hidden] + 2 * [self.groups * self.state], -1)
        x = x.unflatten(-1, (self.groups, shares, -1)).permute(0, 1, 3, 4, 5, 2, 6)  # [B, chunks, 2, G, shares, width, p]
        b = b.unflatten(-1, (self.groups, -1)).permute(0, 1, 3, 4, 2, 5)  # [B, chunks, 2, G, width, N]
        c = c.unflatten(-1, (self.groups, -1)).permute(0, 1, 3, 4, 2, 5)
        dt = dt.unflatten(-1, (2, -1)).float()
        delta = F.softplus(dt if self.dt_bias is None else dt + self.dt_bias)  # [B, chunks, width, 2, heads]
        total = (delta * -self.a_log.float().exp()).cumsum(2)
        delta, total = (v.permute(0, 1, 3, 4, 2).unflatten(3, (self.groups, shares)) for v in (delta, total))
        width = delta.shape[-1]
        later = torch.ones(width, width, dtype=torch.bool, device=dt.device).triu(1)
        decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, -math.inf).exp()
        mix = (c @ b.transpose(-1, -2)).unsqueeze(4) * (decay * delta[..., None, :])
        skip = self.skip.float().view(2, self.groups, shares, 1, 1) * torch.eye(width, device=dt.device)
        return ((mix + skip).to(x.dtype) @ x).permute(0, 1, 5, 2, 3, 4, 6).flatten(4)

    def forward(self, u, projected, chunks):
        """u = (key input, value input), each [B, n, width]; projected: slices of the input projection, [B, n, ...]"""
        z, xbc, dt = projected
        y = chunks.merge(self.scan(self.convolve(chunks.split(xbc)), chunks.split(dt)))  # [B, n, 2, hidden]
        y = F.rms_norm(y * F.silu(z.unflatten(-1, (2, -1))), (self.hidden,), None, 1e-5) * self.norm.to(y.dtype)
        out = [F.linear(y[:, :, i], self.out_proj[i]) for i in (0, 1)]
        return [o + v for o, v in zip(out, u)] if self.residual else out


class AttambaAttention(nn.Module):
    def __init__(self, m, layer, n, ends):
        super().__init__()
        self.heads, self.kv_heads = m["n_heads"], m["n_kv_heads"]
        query, key = self.heads * m["head_dim"], self.kv_heads * m["head_dim"]
        chunking = m["chunking"]
        self.chunks = Chunks(chunking["strategy"], chunking["size"], layer, n, ends)
        mask = attamba_mask(n, self.chunks, chunking["leading_tokens"], chunking["strategy"])
        self.attend = MaskedAttention(mask, m.get("attention", "blocks"), m.get("attention_block", 64))
        self.ssm = SsmPair(key, **m["ssm"])
        self.kv_proj = m["kv_proj"]
        self.sizes = [query] + ([key, key] if self.kv_proj else self.ssm.input_sizes())
        self.in_proj = nn.Parameter(torch.empty(sum(self.sizes), m["dim"]))
        if self.kv_proj:  # the SSMs' inputs are the projected keys and values
            self.ssm_in_proj = nn.Parameter(torch.empty(2, sum(self.ssm.input_sizes()) // 2, key))
        self.wo = nn.Parameter(torch.empty(m["dim"], query))

    def forward(self, x, rope):
        q, *rest = F.linear(x, self.in_proj).split(self.sizes, -1)
        u, projected = (x, x), rest
        if self.kv_proj:
            u = rest
            halves = [s // 2 for s in self.ssm.input_sizes()]
            parts = [F.linear(v, self.ssm_in_proj[i]).split(halves, -1) for i, v in enumerate(u)]
            projected = [torch.cat(pair, -1) for pair in zip(*parts)]
        k, v = self.ssm(u, projected, self.chunks)
        q, k, v = q.unflatten(-1, (self.heads, -1)), k.unflatten(-1, (self.kv_heads, -1)), v.unflatten(-1, (self.kv_heads, -1))
        return F.linear(self.attend(rope(q), rope(k), v), self.wo)


class PlainAttention(nn.Module):
    def __init__(self, m, n):
        super().__init__()
        self.heads = m["n_heads"]
        self.in_proj = nn.Parameter(torch.empty(3 * m["attn_dim"], m["dim"]))
        self.wo = nn.Parameter(torch.empty(m["dim"], m["attn_dim"]))
        mask = None
        if m["sliding_window"]:
            mask = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - m["sliding_window"])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x, rope):
        q, k, v = F.linear(x, self.in_proj).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (a.transpose(1, 2) for a in (rope(q), rope(k), v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.mask is None)
        return F.linear(y.transpose(1, 2).flatten(2), self.wo)


class Block(nn.Module):
    def __init__(self, m, layer, n, ends):
        super().__init__()
        self.attention_norm = RmsNorm(m["dim"], m["norm_eps"])
        self.attention = AttambaAttention(m, layer, n, ends) if m["kind"] == "attamba" else PlainAttention(m, n)
        self.ffn_norm = RmsNorm(m["dim"], m["norm_eps"])
        self.w13 = nn.Parameter(torch.empty(2 * m["ffn_dim"], m["dim"]))
        self.w2 = nn.Parameter(torch.empty(m["dim"], m["ffn_dim"]))

    def forward(self, h, rope):
        h = h + self.attention(self.attention_norm(h), rope)
        gate, up = F.linear(self.ffn_norm(h), self.w13).chunk(2, -1)
        return h + F.linear(F.silu(gate) * up, self.w2)


class Model(nn.Module):
    def __init__(self, m, n, ends=None):
        super().__init__()
        head_dim = m["head_dim"] if m["kind"] == "attamba" else m["attn_dim"] // m["n_heads"]
        self.embeddings = nn.Parameter(torch.empty(m["vocab_size"], m["dim"]))
        self.blocks = nn.ModuleList(Block(m, l, n, ends and ends.get(l)) for l in range(m["n_layers"]))
        self.norm = RmsNorm(m["dim"], m["norm_eps"])
        self.output = None if m["tie_embeddings"] else nn.Parameter(torch.empty(m["vocab_size"], m["dim"]))
        self.rope = Rope(n, head_dim, m["rope_theta"])

    def forward(self, tokens):
        h = F.embedding(tokens, self.embeddings)
        for block in self.blocks:
            h = block(h, self.rope)
        return F.linear(self.norm(h), self.embeddings if self.output is None else self.output)

    @torch.no_grad()
    def initialise(self):
        for name, p in self.named_parameters():
            if name.endswith("a_log"):
                p.uniform_(0.01, 2).log_()
            elif p.dim() >= 2 and not name.endswith(("norm", "skip", "dt_bias")):
                sigma = p.shape[-1] ** -0.5
                nn.init.trunc_normal_(p, std=sigma, a=-3 * sigma, b=3 * sigma)


def parameters_from_golden(m, named):
    """The specification's parameters (name to tensor), joined the way this file joins them."""
    out = {"embeddings": named["tok_embeddings.weight"], "norm.weight": named["norm.weight"]}
    if not m["tie_embeddings"]:
        out["output"] = named["output.weight"]
    for l in range(m["n_layers"]):
        src, dst = f"layers.{l}.", f"blocks.{l}."
        a, f = src + "attention.", src + "feed_forward."
        for norm in ("attention_norm.weight", "ffn_norm.weight"):
            out[dst + norm] = named[src + norm]
        out[dst + "attention.wo"] = named[a + "wo.weight"]
        out[dst + "w13"] = torch.cat([named[f + "w1.weight"], named[f + "w3.weight"]])
        out[dst + "w2"] = named[f + "w2.weight"]
        if m["kind"] == "transformer":
            out[dst + "attention.in_proj"] = torch.cat([named[a + w + ".weight"] for w in ("wq", "wk", "wv")])
            continue
        s = m["ssm"]
        pair = lambda name: [named[a + which + name] for which in ("k_ssm.", "v_ssm.")]
        sizes = [s["hidden"], s["hidden"] + 2 * s["groups"] * s["state"], s["heads"]]
        if m["kv_proj"]:
            rows = [named[a + "wk.weight"], named[a + "wv.weight"]]
            out[dst + "attention.ssm_in_proj"] = torch.stack(pair("in_proj.weight"))
        else:
            rows = [part for parts in zip(*(w.split(sizes) for w in pair("in_proj.weight"))) for part in parts]
        out[dst + "attention.in_proj"] = torch.cat([named[a + "wq.weight"], *rows])
        for ours, theirs in dict(conv="conv.weight", a_log="A_log", skip="D", dt_bias="dt_bias", norm="norm.weight",
                                 out_proj="out_proj.weight").items():
            if (ours != "conv" or s["conv"]) and (ours != "dt_bias" or s["dt_bias"]):
                out[dst + "attention.ssm." + ours] = torch.stack(pair(theirs))
    return out


# ------------------------------------------------------------------------------------------------------------ training
class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy in float32. Float32 logits turn into log-probabilities and those into the gradient in place: nobody
    else reads them, and at 32,000 words a further copy costs more than the arithmetic."""

    @staticmethod
    def forward(ctx, logits, targets):
        log_p = logits.float()
        torch.log_softmax(log_p, -1, out=log_p)
        ctx.saved, ctx.dtype = (log_p, targets[:, None]), logits.dtype
        return -log_p.gather(1, targets[:, None]).mean()

    @staticmethod
    def backward(ctx, grad):
        log_p, targets = ctx.saved
        del ctx.saved
        p = log_p.exp_()
        p.scatter_add_(1, targets, p.new_full((1, 1), -1.0).expand_as(targets))
        return p.mul_(grad / len(p)).to(ctx.dtype), None


class Trainer:
    """One AdamW step: forward, float32 cross-entropy, backward, clip at norm 1, update.

    bfloat16 is either `autocast` (float32 weights, matrix products in bf16) or `weights` (bf16 weights and gradients with
    float32 masters that the optimizer holds).
    """

    def __init__(self, model, mode, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.033, compile_model=False, optimizer="fused",
                 plain_loss=False):
        self.model, self.mode = model, mode
        self.plain_loss = plain_loss or compile_model
        self.parameters = list(model.parameters())
        self.masters = self.parameters
        if mode == "weights":
            self.masters = [p.detach().clone() for p in self.parameters]
            for p in self.parameters:
                p.data = p.data.bfloat16()
        kind = {"fused": dict(fused=True), "foreach": dict(foreach=True), "default": {}}[optimizer]
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **kind)
        self.loss = torch.compile(self.loss_of) if compile_model else self.loss_of

    def loss_of(self, inputs, targets):
        device = inputs.device.type
        with torch.autocast(device, torch.bfloat16) if self.mode == "autocast" else contextlib.nullcontext():
            logits = self.model(inputs)
        logits, targets = logits.flatten(0, 1), targets.flatten()
        if self.plain_loss:
            return F.cross_entropy(logits.float(), targets)
        return CrossEntropy.apply(logits, targets)

    def step(self, inputs, targets, lr=None):
        loss = self.loss(inputs, targets)
        loss.backward()
        if self.masters is not self.parameters:
            for master, p in zip(self.masters, self.parameters):
                master.grad = p.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        if lr is not None:
            self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        if self.masters is not self.parameters:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)
                for master, p in zip(self.masters, self.parameters):
                    master.grad = p.grad = None
        self.optimizer.zero_grad()
        return loss.detach(), norm


def schedule(step, o):
    if step < o["warmup"]:
        return o["lr"] * step / o["warmup"]
    s, low = (step - o["warmup"]) / (o["steps"] - o["warmup"]), o["lr_min_ratio"]
    return o["lr"] * (low + (1 - low) * (1 + math.cos(math.pi * s)) / 2)


def check(path, variant):
    """Compares logits, losses and gradient norms of a golden file; true when all stay within the file's float32 tolerance."""
    import h5py

    with h5py.File(path) as file:
        m, o = json.loads(file.attrs["model"]), json.loads(file.attrs["optim"])
        allowed = json.loads(file.attrs["float32_error"])
        tokens = torch.tensor(file["tokens"][()], dtype=torch.long)
        ends = {int(l): e[()].tolist() for l, e in file["chunk_ends"].items()} if "chunk_ends" in file else None
        named = {}
        file["params"].visititems(lambda n, d: named.update({n: torch.tensor(d[()])}) if isinstance(d, h5py.Dataset) else None)
        logits, losses, norms = (torch.tensor(file[k][()]) for k in ("logits", "losses", "grad_norms"))
    n = tokens.shape[2] - 1
    block = max([b for b in range(1, n) if n % b == 0], default=1)
    plain = variant == "plain"
    model = Model(dict(m, attention="mask" if plain else "blocks", attention_block=block), n, ends)
    model.load_state_dict(parameters_from_golden(m, named), strict=True)
    with torch.no_grad():
        ours = model(tokens[0, :, :-1]).double()
    trainer = Trainer(model, "float32", o["lr"], (o["beta1"], o["beta2"]), o["eps"], o["weight_decay"],
                      optimizer="default" if plain else "fused", plain_loss=plain)
    steps = [trainer.step(batch[:, :-1], batch[:, 1:], schedule(i, o)) for i, batch in enumerate(tokens)]
    errors = {
        "logits": (((ours - logits).norm() / logits.norm()).item(), max(8 * allowed["logits"], 2e-6)),
        "losses": (max(abs(float(s[0]) - float(l)) for s, l in zip(steps, losses)), max(8 * allowed["losses"], 2e-6)),
        "first_grad_norm": (abs(float(steps[0][1] / norms[0]) - 1), max(8 * allowed["grads_together"], 2e-6)),
    }
    ok = all(error <= bound for error, bound in errors.values())
    print(json.dumps({"check": path, "variant": variant, "ok": ok, **{k: {"error": e, "allowed": b} for k, (e, b) in errors.items()}}))
    return ok


def keep_freed_memory():
    """Lets glibc reuse the memory of large tensors instead of returning it to the kernel, which clears it page by page again."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def step_of(trainer, tokens):
    return trainer.step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[0]


def steps_one_by_one(args, trainer, tokens_of):
    """Seconds of the measured steps, and the losses of all."""
    seconds, losses, started = [], [], time.perf_counter()
    for step in range(args.warmup + args.steps):
        tokens = tokens_of()
        begin = time.perf_counter()
        losses.append(float(step_of(trainer, tokens)))
        if step >= args.warmup:
            seconds.append(time.perf_counter() - begin)
        if args.seconds and seconds and time.perf_counter() - started > args.seconds:
            break
    return seconds, losses


def steps_queued(args, trainer, tokens_of):
    """The same on a GPU, by its own clock: Python enqueues steps ahead of the GPU, as in training, and what it takes to launch
    kernels counts only where the GPU has to wait for it."""
    marks, losses, started = [], [], time.perf_counter()
    for step in range(args.warmup + args.steps + 1):
        if step >= args.warmup:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        late = args.seconds and len(marks) > 1 and time.perf_counter() - started > args.seconds
        if late or step == args.warmup + args.steps:
            break
        losses.append(step_of(trainer, tokens_of()))
        if len(marks) > 1:
            marks[-2].synchronize()  # one step waits while another one runs
    torch.cuda.synchronize()
    seconds = [begin.elapsed_time(end) / 1e3 for begin, end in zip(marks, marks[1:])]
    return seconds, [float(loss) for loss in losses]


def measure(args, variant):
    """Trains for some steps on random tokens, the same for every variant, and prints one line of JSON."""
    plain, device = variant == "plain", torch.device(args.device)
    if device.type == "cpu" and not plain and not args.plain_malloc:
        keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(args.matmul_precision)
    ssm = dict(PAPER["ssm"], hidden=args.ssm_hidden, state=args.ssm_state)
    chunking = dict(strategy=args.chunking, size=args.chunk, leading_tokens=args.leading)
    attention, optimizer = ("mask", "default") if plain else (args.attention, args.optimizer)
    m = dict(PAPER, kind=args.model, ssm=ssm, chunking=chunking, attention=attention, attention_block=args.attention_block)
    model = Model(m, args.sequence)
    model.initialise()
    model.to(device)
    count = sum(p.numel() for p in model.parameters())
    mode = "float32" if args.dtype == "float32" else args.mixed
    trainer = Trainer(model, mode, 1e-3, compile_model=args.compile, optimizer=optimizer, plain_loss=plain)
    tokens = lambda: torch.randint(m["vocab_size"], (args.batch, args.sequence + 1), device=device)
    seconds, losses = (steps_queued if device.type == "cuda" else steps_one_by_one)(args, trainer, tokens)
    tokens_per_step = args.batch * args.sequence
    print(json.dumps({
        "variant": variant, "model": args.model, "parameters": count, "batch": args.batch, "sequence": args.sequence,
        "dtype": args.dtype, "mixed": mode if args.dtype == "bfloat16" else None, "compile": args.compile, "device": args.device,
        "device_name": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "tokens_per_s_median": round(tokens_per_step / statistics.median(seconds), 1),
        "tokens_per_s_best": round(tokens_per_step / min(seconds), 1), "seconds_median": round(statistics.median(seconds), 4),
        "steps": len(seconds), "first_loss": round(losses[0], 4), "last_loss": round(losses[-1], 4),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["attamba", "transformer"], default="attamba")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--mixed", choices=["autocast", "weights"], default="autocast", help="how bfloat16 is done")
    parser.add_argument("--chunking", choices=["uniform", "cyclic", "none"], default="cyclic")
    parser.add_argument("--chunk", type=int, default=8, help="tokens per chunk")
    parser.add_argument("--leading", type=int, default=8, help="recent tokens seen in full")
    parser.add_argument("--ssm-hidden", type=int, default=256)
    parser.add_argument("--ssm-state", type=int, default=32)
    parser.add_argument("--variants", nargs="+", choices=["plain", "tuned"], default=["tuned"],
                        help="measured one after another; flags below that say how something is done are for tuned")
    parser.add_argument("--attention", choices=["blocks", "mask"], default="blocks", help="how the chunk mask is applied")
    parser.add_argument("--attention-block", type=int, default=64, help="queries per block")
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's choice")
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before measuring")
    parser.add_argument("--seconds", type=float, default=0, help="stop early once this much time has passed")
    parser.add_argument("--optimizer", choices=["fused", "foreach"], default="fused")
    parser.add_argument("--matmul-precision", choices=["highest", "high", "medium"], default="highest")
    parser.add_argument("--plain-malloc", action="store_true", help="leave the allocator as it is")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--check", nargs="+", metavar="GOLDEN.h5", help="compare with golden files instead of measuring")
    args = parser.parse_args()
    if args.check:
        sys.exit(0 if all([check(path, how) for path in args.check for how in ("tuned", "plain")]) else 1)
    for variant in sorted(args.variants):  # plain first: tuned changes the allocator
        measure(args, variant)


if __name__ == "__main__":
    main()
