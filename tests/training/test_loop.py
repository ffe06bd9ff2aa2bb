"""`ibmd distill` end to end on a tiny teacher: its folder, its settings, its updates."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from distilling import SMALL, distill, interrupt, log, same, weights
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ibmd_cli.errors import IbmdError
from ibmd_cli.models.folder import load_model
from ibmd_cli.reporting import Meter
from ibmd_cli.training.optimise import FP16_PATIENCE, PATIENCE, Diverged, Player, Schedule


@pytest.fixture
def arguments(tiny_teacher: Path, drawings: Path) -> list[object]:
    return ["--teacher", tiny_teacher, "--data", drawings, *SMALL, "--quiet"]


def test_run_folder(arguments: list[object], tmp_path: Path):
    out = tmp_path / "run"
    result = distill(*arguments, "--out", out)
    assert result.stdout.split() == [str(out / "student")]
    files = {"config.json", "metrics.jsonl", "run.html", "previews", "checkpoints", "student"}
    assert {f.name for f in out.iterdir()} == files
    assert [f.name for f in sorted((out / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    assert [f.name for f in sorted((out / "previews").iterdir())] == [f"step-{k:06d}.png" for k in (0, 2, 4)]
    lines = log(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    names = "step bridge_loss student_loss lr images seconds images_per_second micro_batch peak_memory_bytes skipped"
    assert set(lines[0]) == {*names.split(), "broken_images", "bridge_lag"}
    assert set(lines[1]) - set(lines[0]) == {"diversity", "teacher_diversity"}  # with each preview
    assert lines[-1]["images"] == 4 * 4 * 3
    student = load_model(str(out))
    assert student.config["training"]["step"] == 4
    assert student.config["licence"] == "MIT"
    assert student.config["sampling"]["noise"] == {"channels": 3, "grid": 16}


def test_student_moves_and_same_seed_gives_the_same(arguments: list[object], tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        distill(*arguments, "--out", tmp_path / name, "--seed", seed)
    assert same(tmp_path / "a", tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("options", [["--micro-batch", "1"], ["--recompute"], ["--checkpointing"]])
def test_ways_to_save_memory_change_nothing_else(arguments: list[object], tmp_path: Path, options: list[str]):
    if options == ["--micro-batch", "1"]:
        options = [*options, "--batch-size", "1"]  # one image: the same draws either way
        arguments = [*arguments, "--batch-size", "1"]
    distill(*arguments, "--no-recompute", "--out", tmp_path / "plain")
    distill(*arguments, *options, "--out", tmp_path / "lean")
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "lean")
    # the same sums in another order of backward passes: float32 rounding, enlarged by Adam's division
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


def test_data_that_cannot_serve(tiny_teacher: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for data, message in ((tmp_path / "empty", "no images in it"), (tmp_path / "absent", "no such folder")):
        with pytest.raises(IbmdError, match=message):
            distill("--teacher", tiny_teacher, "--data", data, "--out", tmp_path / "run")
    (tmp_path / "empty" / "text.png").write_text("not an image")
    with pytest.raises(IbmdError, match="1 of 1 images cannot be read"):
        distill("--teacher", tiny_teacher, "--data", tmp_path / "empty", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_progress_counts_the_warm_up(arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Meter, "SECONDS", 0.0)
    spoken = [argument for argument in arguments if argument != "--quiet"]
    told = distill(*spoken, "--steps", 1, "--bridge-warmup", 2, "--out", tmp_path / "run").stderr
    assert "distilling 0/1  warm-up 1/2\ndistilling 0/1  warm-up 2/2\ndistilling 1/1" in told


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_networks_are_split_by_our_flag(
    arguments: list[object], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(IbmdError, match=f"ACCELERATE_USE_{name}: .* --fsdp splits the networks"):
        distill(*arguments, "--out", tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is one: add --processes N"),
        (["--compile"], "does not go with --compile"),
        (["--precision", "fp16"], "use bf16"),
        (["--micro-batch", "auto"], "give a number"),
    ],
)
def test_splitting_has_conditions(arguments: list[object], tmp_path: Path, options: list[str], message: str):
    with pytest.raises(IbmdError, match=message):
        distill(*arguments, "--fsdp", *options, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the compiler itself
def test_compiled_networks_learn_the_same(
    arguments: list[object], tmp_path: Path, gradients: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    """With the compiler's tracing alone: its C++ takes minutes."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: real(network, backend="aot_eager"))
    arguments = [*arguments, "--steps", 1, "--bridge-steps", 1]
    for options in ([], ["--compile"]):
        distill(*arguments, *options, "--out", tmp_path / str(len(gradients)))
    plain, compiled = torch.cat(gradients[:2]), torch.cat(gradients[2:])
    assert not torch.equal(plain, compiled)
    assert torch.allclose(plain, compiled, rtol=1e-4, atol=1e-5)
    assert weights(tmp_path / "0").keys() == weights(tmp_path / "2").keys()


def test_batch_that_does_not_divide(arguments: list[object], tmp_path: Path):
    with pytest.raises(IbmdError, match="--batch-size 4 is not a multiple"):
        distill(*arguments, "--micro-batch", "3", "--out", tmp_path / "run")


def test_dry_run_prints_every_value_with_its_origin(arguments: list[object], tmp_path: Path):
    result = distill(*arguments, "--out", tmp_path / "run", "--dry-run", "--json")
    report = json.loads(result.stdout)
    assert report["settings"]["steps"] == 4
    assert report["origins"]["steps"] == "flag"
    assert report["origins"]["ema"] == "default"
    assert report["plan"]["parameters of the student"] > report["plan"]["parameters of the teacher"]
    assert (
        report["plan"]["memory of each process, bytes"]
        > report["plan"]["activations, bytes per image of a micro-batch"]
    )
    assert not (tmp_path / "run").exists()


def test_plan_of_split_networks_takes_a_share_of_what_is_fixed(arguments: list[object], tmp_path: Path):
    command = [*arguments, "--out", tmp_path / "run", "--micro-batch", "1", "--dry-run", "--json"]
    options = ([], ["--fsdp", "--processes", "2"], ["--fsdp", "--processes", "4"])
    plans = [json.loads(distill(*command, *more).stdout)["plan"] for more in options]
    alone, half, quarter = (plan["memory of each process without activations, bytes"] for plan in plans)
    assert half == alone // 2
    assert quarter == alone // 4


def test_list_teachers():
    report = json.loads(distill("--list-teachers", "--json").stdout)
    licences = {row["teacher"]: row["licence"] for row in report["teachers"]}
    assert licences["builtin:outline2emoji"] == "CC-BY-SA-4.0"
    assert "builtin:outline2emoji" in distill("--list-teachers").stdout


@pytest.mark.parametrize("recompute", ["--recompute", "--no-recompute"])
def test_mixed_precision_follows_full_precision(arguments: list[object], tmp_path: Path, recompute: str):
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)  # its precision is one per process
        distill(*arguments, recompute, "--lr", "1e-3", "--precision", precision, "--out", tmp_path / precision)
    full, mixed = weights(tmp_path / "fp32"), weights(tmp_path / "bf16")
    moved = max(float((full[key] - v).abs().max()) for key, v in mixed.items())
    # Adam moves a weight by at most about lr per step, whatever the gradient's rounding
    assert 0 < moved <= 2 * 4 * 1e-3
    AcceleratorState._reset_state(reset_partial_state=True)


def test_multi_step_student(arguments: list[object], tmp_path: Path):
    distill(*arguments, "--nfe", "2", "--timesteps", "1,0.3", "--out", tmp_path / "run")
    student = load_model(str(tmp_path / "run"))
    assert student.config["sampling"]["timesteps"] == [1.0, 0.3]
    assert student.nfe == 2
    first = ["--init", tmp_path / "run", "--lr", "1e-9"]
    distill(*arguments, *first, "--out", tmp_path / "one")
    before, after = weights(tmp_path / "run"), weights(tmp_path / "one")
    assert all(torch.allclose(before[key], v, atol=1e-8) for key, v in after.items())
    assert load_model(str(tmp_path / "one")).nfe == 1
    with pytest.raises(IbmdError, match=r"another kind of student \(noise: .*'grid': 16.* there, .*'grid': 2.* here\)"):
        distill(*arguments, *first, "--noise-grid", "2", "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.fixture
def gradients() -> Iterator[list[torch.Tensor]]:
    """The gradients of each optimiser step."""
    found: list[torch.Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        found.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]))

    hook = register_optimizer_step_pre_hook(look)
    yield found
    hook.remove()


@pytest.mark.parametrize("nfe", [1, 2])
def test_micro_batches_give_the_same_update(
    arguments: list[object], tmp_path: Path, gradients: list[torch.Tensor], nfe: int
):
    """1 × 16, 4 × 4 and 16 × 1 images: they are the same images, times, steps and noise, and the loss is a mean."""
    arguments = [*arguments, "--batch-size", 16, "--steps", 1, "--nfe", nfe]
    for micro in (0, 4, 1):
        distill(*arguments, "--micro-batch", micro, "--out", tmp_path / str(micro))
    whole, *others = (torch.cat(gradients[i : i + 3]) for i in (0, 3, 6))  # bridge model, bridge model, student
    assert whole.abs().max() > 0.01
    for other in others:
        assert torch.allclose(whole, other, rtol=1e-5, atol=1e-6)


def test_micro_batch_may_change_in_a_run(arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    distill(*arguments, "--out", tmp_path / "whole")
    command = [*arguments, "--out", tmp_path / "cut"]
    interrupt(monkeypatch, command, 2)
    distill(*command, "--micro-batch", "2")
    assert [line["micro_batch"] for line in log(tmp_path / "cut")] == [4, 4, 2, 2]
    one, other = ([line["student_loss"] for line in log(tmp_path / name)] for name in ("whole", "cut"))
    assert one == pytest.approx(other, rel=1e-5)


def test_micro_batch_that_fits(arguments: list[object], tmp_path: Path):
    distill(*arguments, "--micro-batch", "auto", "--out", tmp_path / "auto")
    distill(*arguments, "--out", tmp_path / "plain")
    assert log(tmp_path / "auto")[0]["micro_batch"] == 4
    assert same(tmp_path / "auto", tmp_path / "plain")  # trying left no trace
    with pytest.raises(IbmdError, match="not even one image fits into 0.0001 GiB: --recompute, --checkpointing"):
        distill(*arguments, "--micro-batch", "auto", "--memory", "0.0001", "--out", tmp_path / "small")


def squares(player: Player, factor: float = 1.0, dtype: torch.dtype = torch.float32):
    """The loss of a linear layer, times a factor that need not be finite."""

    def compute(rng: torch.Generator, backward: Callable[[torch.Tensor], None]) -> float:
        loss = factor * player.model(torch.ones(2, 3)).to(dtype).square().mean()
        backward(loss)
        return loss.item()

    return compute


def small_player(accelerator: Accelerator | None = None, ema: float | None = None) -> Player:
    torch.manual_seed(0)
    layer, accelerator = torch.nn.Linear(3, 1), accelerator or Accelerator(cpu=True)
    return Player("p", layer, accelerator, Schedule(0.1), steps=9, seed=0, ema=ema)


@pytest.mark.parametrize("factor", [torch.nan, torch.inf, 1e38])  # the last: a finite loss with an infinite gradient
def test_step_that_is_not_finite_is_skipped(factor: float):
    player, twin = small_player(ema=0.9), small_player(ema=0.9)
    for each in (player, twin):
        each.update(0, squares(each))
    with torch.no_grad():
        player.network.bias.fill_(1.0)
        twin.network.bias.fill_(1.0)
    player.update(1, squares(player, factor))
    assert (player.skipped, player.in_a_row) == (1, 1)
    for each in (player, twin):
        each.update(2, squares(each))
    assert (player.skipped, player.in_a_row) == (1, 0)
    for one, other in zip(player.averaged().parameters(), twin.averaged().parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(player.network.parameters(), twin.network.parameters(), strict=True):
        assert torch.equal(one, other)  # so the moments are the same, too


def test_patience_ends_and_survives_a_checkpoint():
    player = small_player()
    for step in range(PATIENCE - 1):
        player.update(step, squares(player, torch.nan))
    again = small_player()
    again.load_state_dict(player.state_dict())
    with pytest.raises(Diverged, match=f"p step {PATIENCE}: loss nan, .* not finite {PATIENCE} times in a row"):
        again.update(PATIENCE - 1, squares(again, torch.nan))


def test_scaler_of_fp16_finds_its_scale():
    """Overflowing gradients halve the scale until they fit, without an end of patience; then it trains."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    player = small_player(accelerator)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"  # which needs a GPU otherwise
    before = player.network.weight.clone()
    huge = squares(player, 2.0**8, torch.float16)  # which ends at 2^16
    for step in range(PATIENCE + FP16_PATIENCE):
        player.update(step, huge)
        assert torch.equal(player.network.weight, before) == (player.in_a_row > 0)
    assert PATIENCE < player.skipped < FP16_PATIENCE
    assert accelerator.scaler.get_scale() == 2.0 ** (16 - player.skipped)
    for step in range(PATIENCE + FP16_PATIENCE - 1):
        player.update(step, squares(player, torch.nan))
    with pytest.raises(Diverged, match=f"not finite {PATIENCE + FP16_PATIENCE} times"):
        player.update(0, squares(player, torch.nan))
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("decay", "last"), [("none", 1.0), ("linear", 0.1), ("cosine", 0.1)])
def test_schedule(decay: str, last: float):
    schedule = Schedule(1.0, warmup=4, decay=decay, floor=0.1)
    assert schedule(0, 1000) == pytest.approx(0.2)
    assert schedule(1000, 1000) == pytest.approx(last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "fp16"], "--precision fp16 needs a GPU"),
        (["--nfe", "2", "--timesteps", "1"], "--timesteps: 1 times, but --nfe 2"),
        (["--nfe", "2", "--timesteps", "0.5,1"], "--timesteps 0.5, 1: expected times that fall from 1 and stay above"),
        (["--micro-batch", "many"], "--micro-batch many: expected a whole number of at least 0 or auto"),
        (["--data", "builtin:outline2emoji"], "images of 32 pixels, but the teacher is for 16"),
    ],
)
def test_settings_that_do_not_go_together(arguments: list[object], tmp_path: Path, options: list[str], message: str):
    with pytest.raises(IbmdError, match=message):
        distill(*arguments, *options, "--out", tmp_path / "run")
