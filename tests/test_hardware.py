import gc
import os
import sys
import weakref

import pytest
import torch

from wmhlib import hardware
from wmhlib.errors import RecipeError
from wmhlib.hardware import estimate, expected_peak, fit, measured_peak, reset_peak
from wmhlib.losses import total_loss
from wmhlib.network import WMHNet
from wmhlib.presets import preset

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEVICES = {  # name, bytes as torch reports them, precisions computed natively
    "T4": ("Tesla T4", 15.8e9, ("fp16",)), "L4": ("NVIDIA L4", 23.6e9, ("bf16", "fp16")), "A100": ("NVIDIA A100-SXM4-40GB", 42.3e9, ("bf16", "fp16")),
    "A100-80": ("NVIDIA A100-SXM4-80GB", 85.1e9, ("bf16", "fp16")), "H200": ("NVIDIA H200", 150e9, ("bf16", "fp16")),
    "small GPU": ("NVIDIA MX450", 3.3e9, ("fp16",)), "Colab's CPU": ("CPU", 12.7e9, ()), "laptop": ("CPU", 25e9, ("bf16",))}


@pytest.fixture
def pretend(monkeypatch):
    """Makes this machine look like one of DEVICES; gives its device."""

    def device(name):
        label, size, native = DEVICES[name]
        monkeypatch.setattr(hardware, "device_memory", lambda device: (label, int(size)))
        monkeypatch.setattr(hardware, "native_precision", lambda wanted, device: (
            wanted if wanted in native else "fp16" if wanted == "bf16" and device.type == "cuda" else "no"))
        return CPU if label == "CPU" else CUDA

    return device


def chosen(recipe):
    training = recipe.training
    return training.batch_size, training.accumulation, training.precision, training.gradient_checkpointing


@pytest.fixture
def formula(monkeypatch):
    """A simple cost in place of the count: 1 GB, and for each slice 2 GB, half of it in half precision, a quarter checkpointed."""

    def cost(recipe, batch_size, gradient_checkpointing, precision):
        return int(1e9 + 2e9 * batch_size * (1 if precision == "no" else 0.5) * (0.25 if gradient_checkpointing else 1))

    monkeypatch.setattr(hardware, "estimate", cost)


@pytest.mark.parametrize("name, overrides, expected", [
    ("T4", "", (4, 4, "fp16", False)),
    ("L4", "", (4, 4, "bf16", False)),
    ("H200", "", (4, 4, "bf16", False)),  # never larger than asked
    ("T4", "training.batch_size=16 training.accumulation=1", (8, 2, "fp16", False)),
    ("L4", "training.batch_size=16 training.accumulation=1", (16, 1, "bf16", False)),
    ("A100", "training.batch_size=18 training.accumulation=2 training.precision=no", (12, 3, "no", False)),
    ("T4", "training.batch_size=16 training.accumulation=1 training.gradient_checkpointing=true", (16, 1, "fp16", True)),
    ("small GPU", "", (1, 16, "fp16", False)),
    ("small GPU", "training.precision=no", (2, 8, "no", True)),
    ("Colab's CPU", "", (2, 8, "no", False)),
    ("laptop", "", (4, 4, "bf16", False)),
])
def test_micro_batches_fit_and_a_step_keeps_its_slices(pretend, formula, name, overrides, expected):
    recipe = preset("colab", overrides)
    fitted, _ = fit(recipe, pretend(name))
    assert chosen(fitted) == expected
    assert fitted.training.batch_size * fitted.training.accumulation == recipe.training.batch_size * recipe.training.accumulation


def test_the_sentence_says_what_was_asked_what_is_and_why(pretend, formula):
    assert fit(preset("colab", "training.batch_size=16 training.accumulation=1"), pretend("T4"))[1] == (
        "Tesla T4, 15.8 GB: micro-batches of 8 x 2 accumulated (16 slices a step as asked; 16 x 1 would need about 17.0 GB; Dice and BatchNorm "
        "now of 8 at a time); fp16, as bf16 is not native here: about 9.0 GB at the peak (estimated)")
    assert "as asked; bf16: about 5.0 GB" in fit(preset("colab"), pretend("A100-80"))[1]


def test_what_fits_nowhere_says_what_to_change(pretend, monkeypatch):
    monkeypatch.setattr(hardware, "estimate", lambda recipe, size, checkpointed, precision: int(size * 20e9))
    with pytest.raises(RecipeError, match=r"T4 has 15.8 GB.*512 px.*20.0 GB.*inputs.img_size.*at least 23.5 GB"):
        fit(preset("colab"), pretend("T4"))


def test_processes_share_the_memory_of_a_cpu_and_mapped_slices_need_none(pretend, formula):
    device = pretend("laptop")
    assert chosen(fit(preset("colab"), device, processes=2)[0])[:2] == (4, 4)
    assert chosen(fit(preset("colab"), device, processes=4)[0])[:2] == (2, 8)
    assert chosen(fit(preset("colab"), pretend("T4"), processes=4)[0])[:2] == (4, 4)
    device = pretend("laptop")
    alone = expected_peak(preset("colab"), device)
    assert expected_peak(preset("colab"), device, 10**9) == alone + 10**9
    assert expected_peak(preset("colab"), device, 10**12) == hardware.device_memory(device)[1]


def test_with_fit_device_off_only_the_precision_is_set(pretend, formula):
    recipe = preset("colab", "training.fit_device=false training.batch_size=64")
    assert chosen(fit(recipe, pretend("T4"))[0]) == (64, 4, "fp16", False)


@pytest.mark.parametrize("overrides, batch_size, checkpointed, precision", [
    ("", 8, False, "bf16"), ("skip=false inputs.modalities=['flair','t1'] inputs.context=1", 2, False, "no"), ("encoder.depth=4", 4, True, "no")])
def test_the_estimate_is_what_a_real_step_holds(overrides, batch_size, checkpointed, precision):
    """Held to a real forward pass: the storages it keeps for the backward pass are nearly all of the peak."""
    recipe = preset("smoke", f"{overrides} training.gradient_checkpointing={str(checkpointed).lower()}")
    network = WMHNet(recipe).cast_frozen(precision)
    known = {t.untyped_storage().data_ptr() for t in network.state_dict().values()}
    weights = sum(t.untyped_storage().nbytes() for t in network.state_dict().values())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
        fused, scales = network(torch.randn(batch_size, recipe.inputs.channels, 64, 64))
        loss = total_loss(fused, scales, torch.ones(batch_size, 1, 64, 64, dtype=torch.uint8), recipe.loss)[0]
    held = sum(s.nbytes() for address, s in saved.items() if address not in known)
    assert loss.isfinite()
    counted = estimate(recipe, batch_size, checkpointed, precision) - weights - hardware._STATES * trained
    assert 0.95 * held < counted < 1.25 * held


def test_memory_grows_with_slices_and_falls_with_half_precision():
    recipe = preset("smoke")
    one, eight = estimate(recipe, 1, False, "no"), estimate(recipe, 8, False, "no")
    assert 3 * one < eight < 8 * one
    assert estimate(recipe, 8, False, "fp16") == estimate(recipe, 8, False, "bf16") < 0.8 * eight


def test_the_full_network_is_counted_without_being_built(pretend):
    before = measured_peak(CPU)
    assert 3.5e9 < estimate(preset("colab"), 4, False, "bf16") < 5e9
    assert measured_peak(CPU) - before < 0.3e9


def test_an_estimate_leaves_random_numbers_alone():
    state = torch.get_rng_state()
    estimate.__wrapped__(preset("smoke", "adapter.dropout=0.5"), 2, True, "no")
    assert torch.equal(state, torch.get_rng_state())


def test_a_freed_tensor_is_no_longer_held():
    held = hardware.Held()
    with held:
        kept = torch.zeros(1000)
        torch.zeros(5000) + 1
    gc.collect()
    assert (held.bytes, held.peak) == (4000, 44000) and weakref.ref(kept)


def test_this_machine_has_a_name_and_holds_less_than_it_has():
    name, size = hardware.device_memory(CPU)
    assert name == "CPU" and 50e6 < measured_peak(CPU) < size


@pytest.mark.parametrize(("line", "files", "least"), [
    ("0::/user/job", {"memory.max": 9000, "user/memory.max": 5000, "user/job/memory.max": "max"}, 5000),
    ("4:cpu,memory:/slurm/job_1", {"memory/memory.limit_in_bytes": 9000, "memory/slurm/job_1/memory.limit_in_bytes": 4000}, 4000),
    ("3:cpuset:/job", {"job/memory.max": 10}, None)])
def test_the_limits_of_all_groups_around_a_process_count(line, files, least, tmp_path):
    for name, text in {"proc/self/cgroup": line, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert min(hardware._memory_limits(tmp_path)) == (least or sys.maxsize)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not let a process reset its peak")
def test_what_was_freed_before_a_reset_is_not_in_the_peak():
    torch.ones(50_000_000)
    high = measured_peak(CPU)
    reset_peak(CPU)
    assert measured_peak(CPU) < high - 100e6


def test_a_cpu_holds_the_process_and_the_data_too():
    recipe = preset("smoke")
    assert expected_peak(recipe, CPU, data=10**9) - expected_peak(recipe, CPU) == 10**9
    assert expected_peak(recipe, CPU) > estimate(recipe, 8, False, "no") + 500e6
