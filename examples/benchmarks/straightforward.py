"""Algorithm 1 written down plainly, with the published U-Net's structure: what `distill_cost.py` compares with.

The network is channels-first and made of PyTorch's own layers, as in the code of DDBM and DBIM; its parameters have
the names of ours. All three networks record gradients, the student's loss is one graph, Adam and the average go from
tensor to tensor. The draws are those of `ibmd_cli.method.distillation`, so both compute the same numbers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibmd_cli.method.bridges import expand_to
from ibmd_cli.method.distillation import Setup, Sources, draw_time, draw_z
from ibmd_cli.method.noise import BatchStreams, Streams
from ibmd_cli.networks.predictor import Predictor
from ibmd_cli.networks.unet import UNetConfig, sinusoid


class GroupNorm(nn.GroupNorm):
    """GroupNorm in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class ResBlock(nn.Module):
    """Residual block with scale and shift by the time."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, config: UNetConfig, resample: str = "") -> None:
        super().__init__()
        groups = config.norm_groups
        self.in_layers = nn.Sequential(GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(c_emb, 2 * c_out))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, c_out), nn.SiLU(), nn.Dropout(config.dropout), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.resample = {"": nn.Identity(), "down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2.0)}[resample]

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(self.resample(x)) + self.out_layers[1:](h)


class AttentionBlock(nn.Module):
    """Self-attention over all pixels."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = channels // config.head_channels
        self.norm = GroupNorm(config.norm_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        flat = x.flatten(2)
        q, k, v = self.qkv(self.norm(flat)).unflatten(1, (3, self.heads, -1)).unbind(1)  # (B, heads, c, HW)
        h = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT.flatten(1, 2)
        return (flat + self.proj_out(h)).reshape(x.shape)


class Block(nn.Sequential):
    """Layers that take the time."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb)
        return x


class UNet(nn.Module):
    """The ADM U-Net with the "new" order of attention, without class labels."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        c_emb = 4 * config.model_channels
        self.time_embed = nn.Sequential(nn.Linear(config.model_channels, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        widths = [int(m * config.model_channels) for m in config.channel_mult]
        cells, skips, c = config.patch_size**2, [widths[0]], widths[0]
        first = nn.Conv2d(config.in_channels * cells, c, 3, padding=1)
        self.input_blocks = nn.ModuleList([nn.Sequential(first)])

        def attention(level: int, width: int) -> list[nn.Module]:
            return [AttentionBlock(width, config)] if 2**level in config.attention else []

        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Block(ResBlock(c, width, c_emb, config), *attention(level, width)))
                skips.append(c := width)
            if level < len(widths) - 1:
                self.input_blocks.append(Block(ResBlock(c, c, c_emb, config, "down")))
                skips.append(c)
        ends = [ResBlock(c, c, c_emb, config) for _ in range(2)]
        self.middle_block = Block(ends[0], AttentionBlock(c, config), ends[1])
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.num_res_blocks + 1):
                block = Block(ResBlock(c + skips.pop(), width, c_emb, config), *attention(level, width))
                if level and i == config.num_res_blocks:
                    block.append(ResBlock(width, width, c_emb, config, "up"))
                self.output_blocks.append(block)
                c = width
        head = nn.Conv2d(c, config.out_channels * cells, 3, padding=1)
        self.out = nn.Sequential(GroupNorm(config.norm_groups, c), nn.SiLU(), head)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        emb = self.time_embed(sinusoid(c_noise, self.config.model_channels))
        h = self.input_blocks[0](F.pixel_unshuffle(x, self.config.patch_size))
        skips = [h]
        for block in self.input_blocks[1:]:
            skips.append(h := block(h, emb))
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return F.pixel_shuffle(self.out(h), self.config.patch_size)


class Plain(nn.Module):
    """x̂_0 with the network above and the weights of a predictor of ours, which sees x_T."""

    def __init__(self, ours: Predictor) -> None:
        super().__init__()
        self.backbone = UNet(ours.backbone.config)
        self.load_state_dict(ours.state_dict())
        self.bridge, self.preconditioning = ours.bridge, ours.preconditioning
        self.eval()

    def forward(self, x_t: Tensor, t: Tensor, x_T: Tensor, z: Tensor | None = None, label: None = None) -> Tensor:
        c_skip, c_in, c_out = (expand_to(c, x_t) for c in self.preconditioning(self.bridge, t))
        x = [c_in * x_t, x_T] + ([] if z is None else [F.interpolate(z, x_t.shape[-2:])])
        return c_skip * x_t + c_out * self.backbone(torch.cat(x, dim=1), self.bridge.c_noise(t))


def generate(student: nn.Module, setup: Setup, batch: Sources, rng: Streams) -> Tensor:
    t = torch.full((len(batch.x_T),), setup.timesteps[0], device=batch.x_T.device)
    return student(batch.x_T, t, batch.x_T, draw_z(setup, batch.x_T, rng))


def error(predictor: nn.Module, setup: Setup, x_0: Tensor, x_t: Tensor, t: Tensor, x_T: Tensor) -> Tensor:
    return (expand_to(setup.weight(t), x_0) * (predictor(x_t, t, x_T) - x_0) ** 2).mean()


def bridge_loss(bridge_model: nn.Module, student: nn.Module, setup: Setup, batch: Sources, rng: Streams) -> Tensor:
    with torch.no_grad():
        x_0 = generate(student, setup, batch, rng)
    t, eps = draw_time(setup, x_0, rng)
    return error(bridge_model, setup, x_0, setup.bridge.sample(x_0, batch.x_T, t, eps), t, batch.x_T)


def student_loss(
    teacher: nn.Module, bridge_model: nn.Module, student: nn.Module, setup: Setup, batch: Sources, rng: Streams
) -> Tensor:
    x_0 = generate(student, setup, batch, rng)
    t, eps = draw_time(setup, x_0, rng)
    x_t = setup.bridge.sample(x_0, batch.x_T, t, eps)
    star = error(teacher, setup, x_0, x_t, t, batch.x_T)
    return star - error(bridge_model, setup, x_0, x_t, t, batch.x_T)


def ibmd(
    teacher: nn.Module,
    bridge_model: nn.Module,
    student: nn.Module,
    average: nn.Module,
    setup: Setup,
    sources: Callable[[Streams], Sources],
    adam_phi: torch.optim.Optimizer,
    adam_theta: torch.optim.Optimizer,
    *,
    batch_size: int,
    steps: int,
    bridge_steps: int,
    seen: Callable[[str, int], None],
) -> None:
    """Run Algorithm 1; `seen` is called with a player's name and the step when its gradient is complete."""
    for k in range(steps):
        for l in range(k * bridge_steps, (k + 1) * bridge_steps):  # noqa: E741
            rng = BatchStreams(range(batch_size), 0, "bridge_model", l)
            adam_phi.zero_grad()
            bridge_loss(bridge_model, student, setup, sources(rng), rng).backward()
            seen("bridge_model", l)
            adam_phi.step()
        rng = BatchStreams(range(batch_size), 0, "student", k)
        adam_theta.zero_grad()
        student_loss(teacher, bridge_model, student, setup, sources(rng), rng).backward()
        seen("student", k)
        adam_theta.step()
        with torch.no_grad():
            for mean, p in zip(average.parameters(), student.parameters(), strict=True):
                mean.mul_(0.99).add_(p, alpha=0.01)
