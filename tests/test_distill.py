import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from wmhlib import distill, embeddings
from wmhlib.checkpoints import Keeper
from wmhlib.distill import feature_loss, mask_loss
from wmhlib.embeddings import cached
from wmhlib.errors import CheckpointError, InputError, RecipeError, WMHError
from wmhlib.files import read_table
from wmhlib.medsam import build_encoder
from wmhlib.promptable import promptable_of, three_channels
from wmhlib.quantised import weight_bytes
from wmhlib.slicestore import CaseSlices
from wmhlib.teacher import PRESETS, Teacher, choose
from wmhlib.volumes import AIR
from wmhlib.weights import read_state
from wmhlib.workspace import RunFolder

SMOKE = PRESETS["smoke"]


def noise_cases(names, slices=3, side=64):
    """Cases of a head with a lesion and grey matter in each slice."""
    y, x = torch.meshgrid(*[torch.arange(side) - side / 2] * 2, indexing="ij")
    head, found = (x**2 + y**2) < (0.4 * side) ** 2, []
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(number)
        images = torch.where(head, torch.randn(1, slices, side, side, generator=generator), AIR).half()
        labels = (4 * head.byte()).expand(slices, -1, -1).clone()
        labels[:, side // 2 : side // 2 + 5, 20:26] = 1
        found.append(CaseSlices(name, images, labels))
    return found


@pytest.fixture(scope="module")
def data():
    return noise_cases(["a", "b", "c"]), noise_cases(["d"])


@pytest.fixture(scope="module")
def taught(data, tmp_path_factory):
    """The smoke distillation: its folder and history."""
    folder = tmp_path_factory.mktemp("distilled")
    return folder, distill.distill(SMOKE, *data, folder, progress=False)


def test_the_mask_loss_is_the_kl_divergence_of_softened_masks():
    student, teacher = 3 * torch.randn(2, 4, 1, 8, 8)
    p, q = (torch.stack([torch.sigmoid(x / 2), torch.sigmoid(-x / 2)], -1).double() for x in (teacher, student))
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    assert float(mask_loss(student, teacher, 2.0)) == pytest.approx(float(expected), rel=1e-4)
    assert float(mask_loss(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)


def test_the_squared_factor_keeps_gradients_as_large_at_any_temperature():
    teacher = 0.1 * torch.randn(1, 1, 16, 16)
    gradients = []
    for temperature in (4.0, 40.0):
        student = (teacher + 0.1).requires_grad_()
        mask_loss(student, teacher, temperature).backward()
        gradients.append(student.grad.norm())
    assert float(gradients[0] / gradients[1]) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_the_feature_loss_is_that_of_channels_normalised_by_the_teachers_own_statistics(kind):
    teacher = 3 + 5 * torch.randn(2, 256, 4, 4)
    mean, std = teacher.mean((0, 2, 3), keepdim=True), teacher.std((0, 2, 3), correction=0, keepdim=True)
    student = torch.randn_like(teacher)
    far = (student - teacher).abs() / std
    expected = far**2 if kind == "mse" else torch.where(far < 1, far**2 / 2, far - 0.5)
    assert float(feature_loss(student, teacher, mean, std, kind)) == pytest.approx(float(expected.mean()), rel=1e-4)
    assert float(feature_loss(mean.expand_as(teacher), teacher, mean, std, "mse")) == pytest.approx(1, rel=1e-3)  # nothing explained


def test_a_student_of_another_grid_is_compared_on_the_teachers():
    ramp = torch.linspace(0, 1, 8).expand(1, 256, 8, 8)
    small = F.interpolate(ramp, (4, 4), mode="bilinear")
    loss = feature_loss(small, ramp, torch.zeros(1, 256, 1, 1), torch.ones(1, 256, 1, 1), "mse")
    assert float(loss) == pytest.approx(float((F.interpolate(small, (8, 8), mode="bilinear") - ramp).square().mean()))


def test_the_student_comes_closer_to_its_teacher(data, tmp_path):
    settings = replace(SMOKE, training=replace(SMOKE.training, epochs=6, restart_epochs=5, batch_size=4, lr=1e-2), mirror=False)
    history = distill.distill(settings, *data, tmp_path, progress=False)
    assert history.val_feature.iloc[-1] < 0.8 * history.val_feature.iloc[0] and history.val_mask.iloc[-1] < history.val_mask.iloc[0]
    assert np.allclose(history.loss, 0.5 * history.feature + 0.5 * history["mask"], rtol=1e-4)


def test_the_same_seed_gives_the_same_student_and_another_one_does_not(data, taught, tmp_path):
    folder, history = taught
    again = distill.distill(SMOKE, *data, tmp_path / "again", progress=False)
    assert again.equals(history) and (tmp_path / "again" / distill.STUDENT).read_bytes() == (folder / distill.STUDENT).read_bytes()
    other = distill.distill(replace(SMOKE, seed=1), *data, tmp_path / "other", progress=False)
    assert not other.equals(history)


def test_a_distillation_that_was_interrupted_ends_as_if_it_had_not_been(data, taught, tmp_path, monkeypatch):
    whole, history = taught
    epoch = distill._Job.epoch
    with monkeypatch.context() as patch:
        patch.setattr(distill._Job, "epoch", lambda job, number: epoch(job, number) if number < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distill.distill(SMOKE, *data, tmp_path, progress=False)
    assert not (tmp_path / distill.STUDENT).exists()
    assert distill.distill(SMOKE, *data, tmp_path, progress=False).equals(history)
    for name in (distill.STUDENT, "history.csv", "embeddings.npy"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(CheckpointError, match="another settings"):
        distill.distill(replace(SMOKE, alpha=0.9), *data, tmp_path, progress=False)


def test_a_session_whose_distillation_another_has_taken_over_stops_and_leaves_its_files(data, tmp_path, monkeypatch):
    epoch = distill._Job.epoch

    def taken(job, number):
        if number == 2:
            with Keeper(RunFolder(tmp_path)) as another:
                another.claim()
                another.hold()
                another.release()  # it is done before the first one looks
        return epoch(job, number)

    monkeypatch.setattr(distill._Job, "epoch", taken)
    with pytest.raises(CheckpointError, match="another session"):
        distill.distill(SMOKE, *data, tmp_path, progress=False)
    assert len(read_table(tmp_path / "history.csv")) == 1 and not (tmp_path / distill.STUDENT).exists()


def test_a_distillation_goes_on_in_another_precision(data, taught, tmp_path):
    job = distill._Job(SMOKE, *data, torch.device("cpu"))
    job.scaler = torch.amp.GradScaler("cpu", enabled=True)
    state = {"student": job.student.state_dict(), "optimizer": job.optimizer.state_dict(), "scaler": {}, "history": []}
    assert job.load(state) == [] and job.scaler.is_enabled()


@pytest.mark.parametrize("context", [0, 1])
def test_a_teacher_without_a_channel_adapter_sees_the_slice_itself_and_not_its_neighbour(context):
    x = torch.randn(1, 1 + 2 * context, 64, 64)
    teacher = Teacher(replace(SMOKE, inputs=replace(SMOKE.inputs, context=context)))
    assert torch.equal(teacher.three(x), three_channels(x[:, [context]]))


def test_settings_that_came_after_a_checkpoint_make_it_no_other():
    state = {name: None for name in distill._STATE}
    tree = json.loads(json.dumps(asdict(SMOKE)))
    del tree["training"]["start"], tree["feature"]
    state["origin"] = {"settings": json.dumps(tree), "teacher": "t", "data": "d"}
    for settings, differing in ((SMOKE, []), (replace(SMOKE, alpha=0.9), ["settings"]), (replace(SMOKE, feature="huber"), ["settings"])):
        assert distill._differing(state, {"settings": "", "teacher": "t", "data": "d"}, settings) == differing


def test_the_students_file_is_a_base_with_the_teachers_other_parts(taught, data):
    folder, _ = taught
    path = str(folder / distill.STUDENT)
    encoder = build_encoder(replace(SMOKE.student, checkpoint=path), 0)
    state, teacher = read_state(path), Teacher(SMOKE)
    assert all(torch.equal(value, state[f"image_encoder.{name}"].float()) for name, value in encoder.state_dict().items())
    assert all(value.dtype == (torch.float16 if value.dim() > 1 else torch.float32) for value in state.values())
    for name, value in promptable_of(state, path).state_dict().items():
        assert torch.equal(value.half(), teacher.promptable.state_dict()[name].half())
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["wmhlib"])["teacher"] == teacher.sha256


@pytest.fixture
def base(tmp_path):
    """A base file with channel adapter and decoder, and a distillation of it."""
    teacher = Teacher(SMOKE)
    adapter = torch.nn.Sequential(torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.GELU(), torch.nn.Conv2d(16, 3, 1))
    adapter[1].running_mean.uniform_()
    parts = {"image_encoder": teacher.encoder, "channel_adapter": adapter, "decoder": torch.nn.Linear(2, 2)}
    state = teacher.promptable.state_dict() | {f"{name}.{key}": value for name, module in parts.items() for key, value in module.state_dict().items()}
    save_file({key: value.half() if value.is_floating_point() else value for key, value in state.items()}, tmp_path / "base.safetensors")
    return adapter, replace(SMOKE, teacher=replace(SMOKE.teacher, checkpoint=str(tmp_path / "base.safetensors")), training=replace(SMOKE.training, epochs=1))


def test_a_base_brings_its_own_channel_adapter_and_hands_everything_on(base, data, tmp_path):
    adapter, settings = base
    distill.distill(settings, *data, tmp_path / "out", progress=False)
    state, given = read_state(tmp_path / "out" / distill.STUDENT), read_state(settings.teacher.checkpoint)
    assert {key for key in state if not key.startswith("image_encoder.")} == {key for key in given if not key.startswith("image_encoder.")}
    assert all(torch.equal(state[key], given[key]) for key in state if not key.startswith("image_encoder."))
    x = torch.randn(2, 1, 16, 16)
    assert torch.allclose(Teacher(settings).three(x), adapter.eval()(x), atol=1e-2)


@pytest.mark.parametrize("name, embeds", [("channel_adapter.1.running_mean", True), ("mask_decoder.iou_token.weight", False)])
def test_other_weights_make_another_teacher_and_other_embeddings_where_these_depend_on_them(base, name, embeds):
    _, settings = base
    before, state = Teacher(settings), read_state(settings.teacher.checkpoint)
    state[name] += 1
    save_file(state, settings.teacher.checkpoint)
    after = Teacher(settings)
    assert after.sha256 != before.sha256 and (after.embeds_sha256 != before.embeds_sha256) == embeds


def test_a_teacher_in_four_bits_embeds_nearly_the_same():
    whole, small = (Teacher(replace(SMOKE, teacher=replace(SMOKE.teacher, bits=bits))) for bits in (16, 4))
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        a, b = whole.encoder(x), small.encoder(x)
    assert weight_bytes(small.encoder) < weight_bytes(whole.encoder) and small.sha256 == whole.sha256
    assert 0 < float((a - b).norm() / a.norm()) < 0.5


def test_a_teacher_without_prompt_parts_teaches_features_alone(base, data, tmp_path):
    _, settings = base
    state = {key: value for key, value in read_state(settings.teacher.checkpoint).items() if key.startswith("image_encoder.")}
    save_file(state, settings.teacher.checkpoint)
    with pytest.raises(CheckpointError, match="alpha to 1"):
        Teacher(settings)
    history = distill.distill(replace(settings, alpha=1.0), *data, tmp_path / "out", progress=False)
    assert history["mask"].isna().all() and history.loss.equals(history.feature) and history.feature.gt(0).all()


def test_a_teacher_whose_file_is_its_encoder_alone_leaves_nothing_of_it_in_the_students(base, data, tmp_path):
    _, settings = base
    state = {key.removeprefix("image_encoder."): value for key, value in read_state(settings.teacher.checkpoint).items() if key.startswith("image_encoder.")}
    save_file(state, settings.teacher.checkpoint)
    distill.distill(replace(settings, alpha=1.0, student=settings.teacher), *data, tmp_path / "out", progress=False)
    student = read_state(tmp_path / "out" / distill.STUDENT)
    assert set(student) == {f"image_encoder.{key}" for key in state}
    assert not torch.equal(student["image_encoder.patch_embed.proj.weight"], state["patch_embed.proj.weight"])


def test_a_student_sees_what_its_teacher_sees():
    job = choose("colab", SMOKE.inputs, "sam_vit_h.pth")
    assert job.teacher.pixels == job.student.pixels == "sam"
    assert choose("colab", SMOKE.inputs, "medsam.pth", "vit_b").student.pixels == "medsam"
    x = torch.rand(1, 1, 64, 64)
    sam = Teacher(replace(SMOKE, teacher=replace(SMOKE.teacher, pixels="sam")))
    torch.testing.assert_close(sam.three(x), three_channels(x, "sam"))


def test_a_refused_distillation_leaves_the_others_embeddings(data, taught):
    folder, _ = taught
    before = (folder / "embeddings.npy").read_bytes()
    with pytest.raises(CheckpointError, match="another settings and teacher"):
        distill.distill(replace(SMOKE, seed=1, teacher=replace(SMOKE.teacher, dim=64)), *data, folder, progress=False)
    assert (folder / "embeddings.npy").read_bytes() == before


def test_other_labels_are_other_data(data, taught):
    folder, _ = taught
    train, val = data
    moved = [replace(case, labels=case.labels.roll(1, 1)) for case in train]
    with pytest.raises(CheckpointError, match="another data"):
        distill.distill(SMOKE, moved, val, folder, progress=False)


def test_a_loss_that_is_not_finite_stops_and_leaves_no_student(data, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "feature_loss", lambda student, *_: student.mean() * float("nan"))
    with pytest.raises(WMHError, match="the loss became nan, its gradient nan in epoch 1, step 1 of"):
        distill.distill(SMOKE, *data, tmp_path, progress=False)
    assert not (tmp_path / distill.STUDENT).exists() and not list(tmp_path.rglob("*.pt*"))


def test_impossible_settings_are_refused():
    for change in ({"alpha": 1.1}, {"feature": "l1"}, {"temperature": 0}):
        with pytest.raises(RecipeError, match=next(iter(change))):
            replace(SMOKE, **change)


def test_no_slices_are_an_input_error(data, tmp_path):
    with pytest.raises(InputError, match="9 slices to learn from and 0 to check with"):
        distill.distill(SMOKE, data[0], [], tmp_path, progress=False)


KEY = {"teacher": "abc", "px": 64, "data": "def"}


@pytest.fixture
def counted(tmp_path):
    """Embeddings computed into a folder, and a list of the items that were computed."""
    done = []

    def compute(items):
        done.extend(items)
        return torch.stack([torch.full((256, 2, 3), float(i)) for i in items])

    return lambda key=KEY, count=5: cached(tmp_path / "e.npy", key, count, compute, 2, progress=False), done, tmp_path / "e.npy"


def test_embeddings_are_computed_once_and_mapped(counted, capsys):
    make, done, _ = counted
    first, again = make(), make()
    assert done == list(range(5)) and isinstance(again.maps, np.memmap) and again.maps.dtype == np.float16
    assert torch.equal(again[[3, 1]][:, 0, 0, 0], torch.tensor([3.0, 1.0])) and not capsys.readouterr().out
    assert torch.allclose(first.mean, torch.full((1, 256, 1, 1), 2.0)) and torch.allclose(first.std, torch.full((1, 256, 1, 1), 2**0.5))


@pytest.mark.parametrize("name", KEY)
def test_embeddings_of_another_teacher_size_or_data_are_computed_again_and_this_is_said(counted, capsys, name):
    make, done, path = counted
    make()
    make(KEY | {name: "other"})
    assert len(done) == 10 and f"{path} is of another {name}: computed again" in capsys.readouterr().out


def test_embeddings_on_a_network_are_mapped_from_a_copy(counted, monkeypatch):
    make, _, path = counted
    here = make()
    monkeypatch.setattr(embeddings, "remote", lambda path: True)
    there = make()
    path.write_bytes(b"")  # gone, as when Drive ends
    assert isinstance(there.maps, np.memmap) and torch.equal(there[[4, 0]], torch.stack([torch.full((256, 2, 3), 4.0), torch.zeros(256, 2, 3)]))
    assert torch.equal(here.mean, there.mean)


def test_a_damaged_or_unfinished_cache_is_computed_again(counted, capsys):
    make, done, path = counted
    make()
    path.write_bytes(path.read_bytes()[:400])
    make()
    path.with_suffix(".json").unlink()
    make()
    assert len(done) == 15 and "is damaged" in (out := capsys.readouterr().out) and "was never finished" in out
    assert {p.name for p in path.parent.iterdir()} == {"e.npy", "e.json"}


def test_embeddings_that_float16_cannot_hold_are_refused(tmp_path):
    with pytest.raises(InputError, match="not finite"):
        cached(tmp_path / "e.npy", KEY, 1, lambda items: torch.full((1, 256, 2, 2), 1e6), 1, progress=False)
    assert not list(tmp_path.iterdir())
