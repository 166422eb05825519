import pytest

from wmhlib.errors import RecipeError
from wmhlib.presets import PRESETS, preset
from wmhlib.settings import Recipe


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    recipe = preset(name)
    assert recipe.name == name and Recipe.from_json(recipe.to_json()) == recipe


def test_the_skip_is_on_in_our_presets_and_off_in_the_original_recipe():
    assert preset("colab").skip and preset("lean").skip and preset("demo").skip and not preset("original").skip


def test_overrides_change_what_they_name_and_nothing_else():
    recipe = preset("demo", "training.epochs=3 inputs.modalities=['flair','t1'] skip=false encoder.checkpoint=a/b.pth")
    assert recipe.training.epochs == 3 and recipe.inputs.modalities == ("flair", "t1") and not recipe.skip
    assert recipe.encoder.checkpoint == "a/b.pth" and recipe.loss == preset("demo").loss


@pytest.mark.parametrize("overrides, message", [
    ("training.epoch=3", "unknown setting training.epoch"), ("trainig.epochs=3", "unknown setting trainig"),
    ("training.epochs=0", "training.epochs = 0"), ("training.epochs=2.5", "expected int"), ("skip=1", "expected bool"),
    ("training=3", "is a section"), ("inputs.img_size=100", "multiple of 16"), ("inputs.modalities=['t1','flair']", "inputs.modalities"),
    ("operating.threshold=1.5", "between 0 and 1"), ("operating.batch_size=0", "operating.batch_size = 0"), ("training.lr=NaN", "training.lr"), ("split.val=0.6 split.test=0.6", "split"),
    ("loss.focal_gamma=0.5", "0, or 1 or more"), ("epochs", "not of the form"), ("split.held_out=101", "'101', in quotes"), ("loss.scale_weights=[1,2]", "four weights"), ("inputs.fov='wide'", "expected float")])
def test_an_impossible_setting_is_named(overrides, message):
    with pytest.raises(RecipeError, match=message):
        preset("colab", overrides)


@pytest.mark.parametrize("text", ["{", "[]", '{"name": 3}', '{"inputs": {"colour": 1}}'])
def test_a_recipe_file_that_is_none_is_refused_by_name(text):
    with pytest.raises(RecipeError):
        Recipe.from_json(text, "recipe.json")


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(RecipeError, match="known are colab, lean, original"):
        preset("huge")
