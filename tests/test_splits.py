import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from wmhlib import splits
from wmhlib.errors import InputError, RecipeError
from wmhlib.files import read_table, write_atomic, write_table
from wmhlib.presets import preset
from wmhlib.workspace import RunFolder


def made_up(sites, sessions=1):
    rng = np.random.default_rng(3)
    rows = [{"case": f"{site}_{i}_{s}", "subject": f"{site}_{i}", "site": site, "lesion_ml": rng.lognormal(1.5, 1.2)}
            for site, n in sites.items() for i in range(n) for s in range(sessions)]
    return pd.DataFrame(rows)


def split_by(cases, overrides="", name="colab"):
    return splits.split_cases(cases, preset(name, overrides))


@st.composite
def cohorts(draw):
    """Subjects with one to three scans each, at one site or at several, some of them alike in burden."""
    rows = []
    for subject in range(draw(st.integers(8, 30))):
        home = draw(st.sampled_from("ABCD"))
        for scan in range(draw(st.integers(1, 3))):
            site = draw(st.sampled_from((home, home, home, "E"))) if scan else home
            rows.append({"case": f"s{subject}_{scan}", "subject": f"s{subject}", "site": site,
                         "lesion_ml": draw(st.sampled_from((0.0, 0.1, 0.2, 0.3, 40.0))), "group": ("training", "test")[subject % 3 == 0]})
    return pd.DataFrame(rows)


one_protocol = st.sampled_from(("stratified", "challenge", "k-fold split.folds=4 split.fold=3"))


@settings(max_examples=20, deadline=None)
@given(cohorts(), one_protocol, st.integers(0, 5))
def test_every_case_is_in_one_part_and_no_subject_in_two(cases, protocol, seed):
    split = split_by(cases, f"split.protocol={protocol} seed={seed}")
    assert split.case.tolist() == cases.case.tolist() and list(split) == ["case", "subject", "site", "lesion_ml", "split"]
    assert set(split.split) == {"train", "val", "test"}
    assert (split.groupby("subject").split.nunique() == 1).all()


@settings(max_examples=20, deadline=None)
@given(cohorts(), one_protocol, st.randoms())
def test_the_order_of_rows_changes_nothing(cases, protocol, random):
    order = random.sample(range(len(cases)), len(cases))
    first, again = (split_by(table, f"split.protocol={protocol}").set_index("case").split.to_dict() for table in (cases, cases.iloc[order]))
    assert first == again


@settings(max_examples=12, deadline=None)
@given(cohorts(), st.integers(2, 8), st.integers(0, 3))
def test_the_folds_test_each_subject_once_and_are_of_one_size(cases, folds, seed):
    tested = [set(split_by(cases, f"split.protocol=k-fold split.folds={folds} split.fold={fold} seed={seed}").query("split == 'test'").subject)
              for fold in range(folds)]
    assert sorted(s for fold in tested for s in fold) == sorted(set(cases.subject))
    assert max(map(len, tested)) - min(map(len, tested)) <= 1


def test_a_fold_spans_sites_and_burden():
    cases = made_up({"A": 30, "B": 15, "C": 3})
    thirds = cases.groupby("site").lesion_ml.rank().mul(3).floordiv(cases.groupby("site").site.transform("size") + 1)
    for fold in range(5):
        tested = split_by(cases, f"split.protocol=k-fold split.fold={fold}").split == "test"
        assert cases[tested].site.value_counts().reindex(["A", "B"]).tolist() == [6, 3]
        assert thirds[tested & (cases.site == "A")].value_counts().tolist() == [2, 2, 2]


@settings(max_examples=12, deadline=None)
@given(cohorts(), st.sampled_from("ABCD"))
def test_a_site_left_out_is_the_test_and_nothing_else(cases, site):
    cases = cases[cases.site != "E"].assign(site=lambda table: table.groupby("subject").site.transform("first"))
    overrides = f"split.protocol=leave-one-site-out split.held_out={site}"
    if (cases.site == site).any() and cases[cases.site != site].subject.nunique() >= 2:
        split = split_by(cases, overrides)
        assert ((split.split == "test") == (split.site == site)).all() and {"train", "val"} < set(split.split)
    else:
        with pytest.raises((InputError, RecipeError)):
            split_by(cases, overrides)


def test_the_challenge_keeps_its_own_test_and_validates_within_its_training():
    cases = made_up({"Utrecht": 20, "Singapore": 20, "GE3T": 20, "GE1T5": 10})
    cases["group"] = np.where((cases.site == "GE1T5") | (cases.index % 2 == 0), "test", "training")
    split = split_by(cases, "split.protocol=challenge split.val=0.2")
    assert ((split.split == "test") == (cases.group == "test")).all()
    assert split[split.split == "val"].site.value_counts().to_dict() == {"Utrecht": 2, "Singapore": 2, "GE3T": 2}


def test_every_site_gives_to_every_part_in_the_shares_asked_for():
    cases = made_up({"Utrecht": 20, "Singapore": 20, "GE3T": 3})
    counts = split_by(cases).groupby(["site", "split"]).size().unstack()
    assert counts.loc["Utrecht"].to_dict() == {"test": 3, "train": 14, "val": 3}
    assert counts.loc["GE3T"].to_dict() == {"test": 1, "train": 1, "val": 1}


def test_small_sites_are_pooled_and_still_serve_every_part():
    split = split_by(made_up({"A": 9, "B": 2, "C": 1, "D": 2}))
    small = split[split.site != "A"].split.value_counts()
    assert small.to_dict() == {"train": 3, "val": 1, "test": 1}
    lone = split_by(made_up({"A": 9, "B": 7, "C": 2}))  # too few to be a pool: they join the smallest other site
    assert set(lone[lone.site == "A"].split) == {"train", "val", "test"} and set(lone[lone.site != "A"].split) == {"train", "val", "test"}


def test_the_test_cases_span_the_burden():
    split = split_by(made_up({"Utrecht": 40}), "split.test=0.3", "demo")
    ranks = split.lesion_ml.rank()[split.split == "test"]
    thirds = np.histogram(ranks, [0, 40 / 3, 80 / 3, 41])[0]
    assert ranks.size == 12 and thirds.min() >= 4 and thirds.max() <= 4


def test_the_seed_decides():
    cases = made_up({"A": 15, "B": 12})
    for protocol in ("stratified", "k-fold"):
        first, again, other = (split_by(cases, f"split.protocol={protocol} seed={seed}").split for seed in (1, 1, 2))
        assert (first == again).all() and (first != other).any()


def test_the_split_of_seed_42_is_what_it_was():
    assert "".join(split_by(made_up({"A": 12, "B": 9}), "", "demo").split.str[1]) == "errrrrreeararreaarrer"


def test_a_person_scanned_at_two_sites_stays_on_one_side():
    cases = made_up({"A": 9, "B": 9}).assign(subject=lambda table: table.case.str[2:])
    for protocol in ("stratified", "k-fold"):
        split = split_by(cases, f"split.protocol={protocol}")
        assert (split.groupby("subject").split.nunique() == 1).all()
    with pytest.raises(InputError, match="site A cannot be left out alone: .*B_0_0"):
        split_by(cases, "split.protocol=leave-one-site-out split.held_out=A")


@pytest.mark.parametrize(("overrides", "error", "message"), [
    ("split.protocol=random", RecipeError, "split.protocol = 'random' is impossible: expected one of stratified, challenge"),
    ("split.protocol=leave-one-site-out", RecipeError, "split.held_out = '' is impossible"),
    ("split.held_out=A", RecipeError, "split.held_out = 'A' is impossible"),
    ("split.protocol=leave-one-site-out split.held_out=Oslo", RecipeError, "held_out = 'Oslo' is no site .* A, B"),
    ("split.protocol=k-fold split.fold=5", RecipeError, "split.fold = 5 is impossible: expected 0 to 4"),
    ("split.fold=1", RecipeError, "split.fold = 1 is impossible"),
    ("split.protocol=k-fold split.folds=1", RecipeError, "split.folds = 1"),
    ("split.protocol=k-fold split.folds=13", InputError, "12 subjects do not fill 13 folds: set split.folds .in notebook 09 folds. to 12"),
    ("split.protocol=challenge", InputError, "needs cases of both groups, and none of this cohort is in training"),
])
def test_a_protocol_that_does_not_fit_is_refused(overrides, error, message):
    with pytest.raises(error, match=message):
        split_by(made_up({"A": 6, "B": 6}), overrides)


def test_a_case_without_a_group_is_named():
    cases = made_up({"A": 9}).assign(group=["training"] * 5 + ["test"] * 3 + [""])
    with pytest.raises(InputError, match="A_8_0 have none: expected training or test"):
        split_by(cases, "split.protocol=challenge")
    with pytest.raises(InputError, match="subject A_0 is on two sides"):
        split_by(cases.assign(group=["training"] * 5 + ["test"] * 4, subject=[f"A_{i % 8}" for i in range(9)]), "split.protocol=challenge")


def test_a_given_split_is_kept_and_a_subject_in_two_of_its_parts_is_named():
    cases = made_up({"A": 4}, sessions=2).assign(group=["training"] * 4 + ["val"] * 2 + ["test"] * 2)
    assert split_by(cases, "split.protocol=given").split.tolist() == ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    with pytest.raises(InputError, match="subject A_1 is on two sides"):
        split_by(edited(cases, "A_1_1", group="test"), "split.protocol=given")


@pytest.mark.parametrize(("sites", "overrides"), [({"A": 2}, ""), ({"A": 1, "B": 1}, ""), ({"A": 2}, "split.protocol=k-fold split.folds=2"),
                                                  ({"A": 9, "B": 1}, "split.protocol=leave-one-site-out split.held_out=A")])
def test_too_few_subjects_are_refused(sites, overrides):
    with pytest.raises(InputError, match="subjects are left to choose"):
        split_by(made_up(sites), overrides)


def test_a_cohort_without_subjects_or_volumes_is_refused():
    cases = made_up({"A": 9})
    with pytest.raises(InputError, match="the cohort has no column subject: .* run notebook 01"):
        split_by(cases.drop(columns="subject"))
    with pytest.raises(InputError, match="no subject for A_2_0"):
        split_by(cases.assign(subject=["" if i == 2 else str(i) for i in range(9)]))
    with pytest.raises(InputError, match="no lesion volume for A_1_0"):
        split_by(cases.assign(lesion_ml=[np.nan if i == 1 else 1.0 for i in range(9)]))


def edited(table, of, **values):
    return table.assign(**{name: table[name].where(table.case != of, value) for name, value in values.items()})


def test_a_split_changed_by_hand_is_checked(tmp_path):
    cases = made_up({"A": 9}, sessions=2)
    write_table(split_by(cases), tmp_path / "split.csv")
    split = splits.check_split(read_table(tmp_path / "split.csv"), cases)
    other = "test" if split.split[0] != "test" else "train"
    for table, message in ((edited(split, "A_0_0", split=other), r"subject A_0 is on two sides .*A_0_0 \(.*A_0_1 \("),
                           (edited(split, "A_0_0", split="Train"), "puts A_0_0 into Train: expected train, val or test"),
                           (pd.concat([split, split.tail(1)]), "names A_8_1 more than once"),
                           (edited(split, "A_0_0", subject="new", split=other), "differ in A_0_0"),
                           (edited(split, "A_0_0", case="A_99_0"), "differ in A_99_0"),
                           (split.drop(columns="subject"), "no column subject: .* run notebook 02")):
        with pytest.raises(InputError, match=message):
            splits.check_split(table, cases)


def test_cases_that_came_after_the_split_are_named(tmp_path, capsys):
    cases, run = made_up({"A": 9}), RunFolder(tmp_path)
    write_table(split_by(cases), run.split_csv)
    for cohort in (cases, pd.concat([cases, cases.tail(1).assign(case="late", subject="late")])):
        write_table(cohort, run.cohort_csv)
        splits.tell_unused(run)
    assert capsys.readouterr().out == "1 cases of the cohort are in no part of the split (late): run notebook 02 again to use them\n"


def test_the_split_that_a_run_was_trained_on_stays(tmp_path, capsys):
    cases, run = made_up({"A": 9}), RunFolder(tmp_path)
    write_atomic(run.recipe_json, preset("smoke").to_json())
    dealt = splits.deal(run, cases)
    first, second = dealt.index[dealt.split == "train"][:1].append(dealt.index[dealt.split == "test"][:1])
    edited = dealt.assign(split=dealt.split.rename({first: second, second: first}).sort_index())
    write_table(edited, run.split_csv)
    assert splits.deal(run, cases).equals(dealt) and read_table(run.split_csv).split.tolist() == dealt.split.tolist()
    write_table(edited, run.split_csv)
    run.checkpoints.mkdir()
    assert splits.deal(run, cases).split.tolist() == edited.split.tolist() and "was trained on it" in capsys.readouterr().out
    write_table(edited.assign(split="none"), run.split_csv)
    with pytest.raises(InputError, match="expected train, val or test"):
        splits.deal(run, cases)


@pytest.mark.parametrize("role", ["flair", "mask"])
def test_one_file_under_two_names_is_found_through_links(tmp_path, role):
    (tmp_path / "real.nii").write_bytes(b"")
    (tmp_path / "link.nii").symlink_to(tmp_path / "real.nii")
    cases = made_up({"A": 9})
    split = split_by(cases)
    pair = [split.case[split.split == part].iloc[0] for part in ("train", "test")]
    files = dict(zip(pair, (str(tmp_path / "real.nii"), str(tmp_path / "link.nii"))))
    with pytest.raises(InputError, match=rf"{role} {tmp_path}/real.nii is on two sides"):
        splits.check_split(split, cases.assign(**{role: cases.case.map(files).fillna("")}))


def test_the_table_counts_cases_and_subjects_of_each_site_and_part():
    table = splits.split_table(split_by(made_up({"B": 6, "A": 9}, sessions=2)))
    assert table.index.tolist() == [(site, part) for site in ("A", "B", "all sites") for part in ("train", "val", "test")]
    assert table.loc["all sites"][["cases", "subjects"]].sum().tolist() == [30, 15] and (table.cases == 2 * table.subjects).all()
    assert (table.least_ml <= table.median_ml).all() and (table.median_ml <= table.most_ml).all()


def test_the_parts_of_a_cohort_of_strokes_are_alike_in_lesion_size():
    rng, distances = np.random.default_rng(1), {"val": [], "test": []}
    sites = rng.multinomial(655 - 33 * 5, rng.dirichlet(np.full(33, 0.6))) + 5  # as many cases and sites as ATLAS v2.0 has
    cases = made_up({f"R{i:03d}": int(n) for i, n in enumerate(sites)})
    for seed in range(4):
        cases["lesion_ml"] = np.exp(rng.uniform(np.log(0.05), np.log(200), len(cases)))
        split = split_by(cases, f"seed={seed}", name="stroke")
        for part, found in distances.items():
            found.append(ks_2samp(split.lesion_ml[split.split == part], split.lesion_ml[split.split != part]).statistic)
    assert len(cases) == 655 and abs((split.split == "test").mean() - 0.15) < 0.01 and abs((split.split == "val").mean() - 0.1) < 0.015
    assert np.mean(distances["test"]) < 0.08 and np.mean(distances["val"]) < 0.1  # 0.10 and 0.12 if subjects were drawn at random
