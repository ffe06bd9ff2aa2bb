"""The networks of `features` against the field's own code, on weights that follow a rule (parity/measuring.py)."""

from pathlib import Path

import pytest
import torch
from parity.measuring import images, outputs, rule, shapes_of
from torch import Tensor

from ibmd_cli.errors import IbmdError, NotAvailable
from ibmd_cli.files import sha256
from ibmd_cli.metrics import weights
from ibmd_cli.metrics.classifiers import InceptionV3, ResNet50
from ibmd_cli.metrics.features import TRUNKS, Classifier, Inception, load_network


def trunk_state(name: str) -> dict[str, Tensor]:
    """Weights of a trunk in torchvision's names, with one of its classifier's."""
    net = torch.nn.Sequential(*TRUNKS[name]()[0])
    state = rule({f"features.{key}": shape for key, shape in shapes_of(net).items()})
    return {**state, "classifier.6.bias": torch.zeros(1000)}


def agree(found: Tensor, key: str) -> None:
    reference = outputs()[key].to(found)
    assert (found - reference).abs().max() <= 1e-4 * max(1.0, reference.abs().max().item()), key


@pytest.fixture(scope="module")
def inception_state() -> dict[str, Tensor]:
    return rule(shapes_of(InceptionV3()))


@pytest.mark.parametrize("size", ["small", "large"])
def test_inception_is_that_of_clean_fid_pytorch_fid_and_torch_fidelity(inception_state: dict, size: str):
    x = images(size, 2, {"small": 64, "large": 320}[size])
    seen = Inception(inception_state, "0", "pytorch")(x)
    agree(seen.pooled, f"cleanfid.{size}")
    agree(seen.pooled, f"pytorch_fid.{size}")
    seen = Inception(inception_state, "0", "tensorflow")(x)
    agree(seen.pooled, f"torch_fidelity.{size}")
    agree(seen.logits, f"torch_fidelity.logits.{size}")


def test_the_two_ways_to_resize_differ():
    assert (outputs()["torch_fidelity.small"] - outputs()["cleanfid.small"]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("metric", "trunk", "side"),
    [
        ("lpips_alex", "alexnet", None),
        ("lpips_alex", "alexnet", 224),
        ("lpips_vgg", "vgg16", None),
        pytest.param("lpips_vgg", "vgg16", 224, marks=pytest.mark.slow),
    ],
)
def test_lpips_is_that_of_lpips(tmp_path: Path, metric: str, trunk: str, side: int | None):
    torch.save(trunk_state(trunk), tmp_path / "weights.pth")
    a, b = images("a", 3, 64), images("b", 3, 64)
    net = load_network(metric, "cpu", "tensorflow", side, lambda _: tmp_path / "weights.pth")
    truth = net(b).maps
    agree(net.distance(net(a).maps, truth), f"lpips.{trunk}.224" if side else f"lpips.{trunk}")
    assert net.distance(truth, truth).abs().max() == 0


def test_st_lpips_is_that_of_its_package():
    net = load_network("stlpips", "cpu", "tensorflow", None)
    a, b = images("a", 3, 64), images("b", 3, 64)
    agree(net.distance(net(a).maps, net(b).maps), "stlpips")
    a, b = a[..., :32, :32], b[..., :32, :32]
    agree(net.distance(net(a).maps, net(b).maps), "stlpips.32")


def test_resnet_is_that_of_torchvision():
    agree(Classifier(rule(shapes_of(ResNet50())), "0")(images("small", 2, 64)).logits, "resnet50")


# --------------------------------------------------------------------------------------------------------- weights


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as the published AlexNet, in a folder; the usual cache is an empty one."""
    file = tmp_path / "given" / "alexnet-owt-7be5be79.pth"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    row = weights.FILES["alexnet"]._replace(digest=sha256(file)[:8], source=(tmp_path / "far" / "a.pth").as_uri())
    monkeypatch.setitem(weights.FILES, "alexnet", row)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return file


def test_weights_are_found_by_name_by_hash_and_in_the_cache(tmp_path: Path, published: Path):
    assert weights.locate("alexnet", [published.parent]) == published
    renamed = published.rename(published.with_name("mine.pth"))
    assert weights.locate("alexnet", [renamed]) == renamed
    cached = tmp_path / "home" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    cached.parent.mkdir(parents=True)
    renamed.rename(cached)
    assert weights.locate("alexnet") == cached


def test_absent_weights_are_named_with_their_address_and_fetched_only_if_asked(tmp_path: Path, published: Path):
    with pytest.raises(NotAvailable, match=r"no weights of AlexNet here: fetch file://.*a.pth and give --weights"):
        weights.locate("alexnet")
    with pytest.raises(NotAvailable, match=r"cannot be fetched .*: fetch it by hand"):
        weights.locate("alexnet", fetch=True, quiet=True)
    (tmp_path / "far").mkdir()
    published.rename(tmp_path / "far" / "a.pth")
    file = weights.locate("alexnet", fetch=True, quiet=True)
    assert file == tmp_path / "home" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    assert file.read_bytes() == b"weights"


def test_weights_of_another_hash_are_refused(tmp_path: Path, published: Path):
    published.write_bytes(b"other")
    with pytest.raises(IbmdError, match=r"alexnet-owt.*: sha256 .*, expected .*: damaged"):
        weights.locate("alexnet", [published.parent])
    with pytest.raises(IbmdError, match=r"--weights .*is of no file that is known: pt_inception"):
        weights.check_given([published])
    with pytest.raises(NotAvailable, match=r"--weights .*no such file or folder"):
        weights.check_given([tmp_path / "gone"])
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.pth").write_bytes(b"on the way")
    with pytest.raises(IbmdError, match=r"damaged on the way"):
        weights.locate("alexnet", fetch=True, quiet=True)
