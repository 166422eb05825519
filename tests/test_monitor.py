import struct
import threading
import types

import IPython.display
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from wmhlib import monitor
from wmhlib.monitor import Monitor
from wmhlib.presets import preset
from wmhlib.workspace import RunFolder

CPU = torch.device("cpu")
RECIPE = preset("smoke", "training.epochs=3")


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run").open(RECIPE)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now.seconds)
    return now


def row(epoch, **more):
    return dict(epoch=epoch, lr=1e-3, train_loss=1 / epoch, focal=0.01, dice=0.5, boundary=0.02, scales=0.4) | more


def validated(epoch):
    return row(epoch, val_loss=0.8, val_dice=0.1 * epoch, **{"val_dice Utrecht": 0.1, "val_dice Amsterdam/GE3T": 0.2})


def train(run, epochs, clock=None, first=1, **more):
    with Monitor(run, RECIPE, CPU, first, **more) as watch:
        history = [validated(epoch) for epoch in range(1, first)]
        for epoch in epochs:
            for _ in watch.steps(epoch, 4):
                if clock:
                    clock.seconds += 10
            if clock:
                clock.seconds += 20
            history.append(validated(epoch))
            watch.epoch(history, True, 80)
    return history


def events(run):
    """All events of a run folder in the order in which TensorBoard reads them; both checksums are held."""
    found = []
    for path in sorted((run.path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size, check = struct.unpack("<QI", data[:12])
            assert check == masked_crc32c(data[:8]) and struct.unpack("<I", data[12 + size : 16 + size])[0] == masked_crc32c(data[12 : 12 + size])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars(run):
    """What TensorBoard shows: a start of a session voids all steps from its own on."""
    shown = {}
    for event in events(run):
        if event.session_log.status == SessionLog.START:
            shown = {key: value for key, value in shown.items() if key[1] < event.step}
        for value in event.summary.value:
            if value.HasField("simple_value"):
                assert (value.tag, event.step) not in shown
                shown[value.tag, event.step] = pytest.approx(value.simple_value)
    return shown


def test_a_line_an_epoch_tells_time_left_speed_and_estimate_beside_the_peak(run, clock, capsys, monkeypatch):
    monkeypatch.setattr(monitor, "measured_peak", lambda device: 2_100_000_000)
    train(run, (1, 2, 3), clock, estimated=1_900_000_000)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == ("epoch   1/3  loss 1.000  val loss 0.800  val Dice 0.100 *  (Utrecht 0.100, Amsterdam/GE3T 0.200)  lr 1.0e-03  60 s  "
                     "2.0 slices/s  2.1 GB (1.9 estimated)  ETA 00:02")
    assert second.endswith("2.1 GB  ETA 00:01") and third.endswith("ETA 00:00")


def test_an_epoch_without_validation_shows_none(run, capsys):
    with Monitor(run, RECIPE, CPU) as watch:
        watch.epoch([row(1)], False, 8)
    assert "val" not in capsys.readouterr().out
    assert not any("validation" in tag for tag, _ in scalars(run))


def test_events_hold_losses_dice_of_each_site_rate_speed_and_memory(run, clock):
    train(run, (1,), clock, estimated=1_900_000_000, note="CPU: as asked")
    shown = scalars(run)
    assert {tag for tag, _ in shown} == {
        "loss/train", "loss/validation", "loss_parts/focal", "loss_parts/dice", "loss_parts/boundary", "loss_parts/scales",
        "validation_dice/mean", "validation_dice/Utrecht", "validation_dice/Amsterdam/GE3T", "training/learning_rate",
        "speed/slices_per_second", "speed/seconds_per_epoch", "memory/peak_GB", "memory/estimated_GB"}
    assert shown["speed/slices_per_second", 1] == 2 and shown["memory/estimated_GB", 1] == 1.9 and shown["loss_parts/dice", 1] == 0.5
    texts = {value.tag: value.tensor.string_val[0].decode() for event in events(run) for value in event.summary.value if value.HasField("tensor")}
    assert '"img_size": 64' in texts["recipe/text_summary"] and texts["device/text_summary"] == "CPU: as asked"


def test_a_resumed_run_shows_every_epoch_once(run):
    train(run, (1, 2))  # the second epoch has no checkpoint
    train(run, (2, 3), first=2)
    assert len(list((run.path / "tensorboard").iterdir())) == 2
    assert sorted(step for tag, step in scalars(run) if tag == "loss/train") == [1, 2, 3]


def test_a_lost_folder_stops_nothing_is_said_once_and_loses_nothing(run, capsys):
    away = run.path.with_name("away")
    with Monitor(run, RECIPE, CPU) as watch:
        watch.epoch([validated(1)], True, 8)
        watch._events._join()
        run.path.rename(away)
        for epoch in (2, 3, 4):
            watch.epoch([validated(epoch)], True, 8)
            watch._events._join()
        assert not run.path.exists()  # nothing grows where Drive would be mounted
        RunFolder(run.path).open(RECIPE)
        watch.epoch([validated(5)], True, 8)
    said = [line for line in capsys.readouterr().out.splitlines() if "TensorBoard" in line]
    assert len(said) == 2 and "training goes on" in said[0] and "again" in said[1]
    assert sorted(step for tag, step in scalars(run) if tag == "loss/train") == [1, 2, 3, 4, 5]


def test_a_disk_that_fails_in_the_middle_of_a_record_leaves_a_whole_file(run):
    with Monitor(run, RECIPE, CPU) as watch:
        watch.epoch([validated(1)], True, 8)
        watch._events._join()
        with open(watch._events.path, "ab") as file:
            file.write(b"half a record")
        watch.epoch([validated(2)], True, 8)
    assert sorted(step for tag, step in scalars(run) if tag == "loss/train") == [1, 2]


def test_a_disk_that_hangs_holds_nobody_up(run, monkeypatch, capsys):
    hang, started = threading.Event(), []
    monkeypatch.setattr(monitor, "_PATIENCE", 0.01)
    monkeypatch.setattr(monitor._Events, "_deliver", lambda self, data: (started.append(1), hang.wait()))
    train(run, (1, 2, 3))
    hang.set()
    assert len(started) == 1 and "history.csv has the same figures" in capsys.readouterr().out


def test_other_processes_say_and_write_nothing(run, capfd):
    train(run, (1,), main=False)
    assert not (run.path / "tensorboard").exists() and capfd.readouterr() == ("", "")


@pytest.fixture
def kernel(monkeypatch):
    """A notebook's kernel; gives the pictures it was told to show."""
    shown = []
    handle = types.SimpleNamespace(update=lambda figure: shown.append(("again", figure)))
    monkeypatch.setattr(IPython, "get_ipython", lambda: types.SimpleNamespace(kernel=object()))
    monkeypatch.setattr(IPython.display, "display", lambda figure, display_id: shown.append(("new", figure)) or handle)
    monkeypatch.delenv("WMHLIB_BATCH", raising=False)
    return shown


def test_a_notebook_shows_one_picture_that_grows(run, kernel):
    train(run, (1, 2, 3))
    assert [how for how, _ in kernel] == ["new", "again", "again"]
    assert len(kernel[-1][1].axes[0].lines[0].get_xdata()) == 3


def test_a_notebook_run_by_the_suite_gets_no_picture(run, kernel, monkeypatch):
    monkeypatch.setenv("WMHLIB_BATCH", "1")
    train(run, (1,))
    assert not kernel


def test_a_terminal_gets_no_picture(monkeypatch):
    monkeypatch.setattr(IPython, "get_ipython", lambda: None)
    assert not monitor.watched()


@pytest.mark.parametrize("seconds, text", [(0, "00:00"), (1, "00:01"), (3600, "01:00"), (3601, "01:01"), (360_000, "100:00")])
def test_time_left_is_rounded_up_to_minutes(seconds, text):
    assert monitor.hours(seconds) == text
