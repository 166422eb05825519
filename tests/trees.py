"""Names of files as the layouts have them, and a table of cases."""

from wmhlib.files import write_atomic
from wmhlib.sections import Inputs


def challenge(case, suffix=".nii.gz"):
    return [f"{case}/pre/FLAIR{suffix}", f"{case}/pre/T1{suffix}", f"{case}/wmh{suffix}"]


def bids(subject, session="", dataset="", pipeline="manual", mask="space-FLAIR_label-WMH_mask"):
    """FLAIR and mask of a scan."""
    place, name = (f"sub-{subject}/ses-{session}", f"sub-{subject}_ses-{session}") if session else (f"sub-{subject}", f"sub-{subject}")
    return [f"{dataset}{place}/anat/{name}_FLAIR.nii.gz", f"{dataset}derivatives/{pipeline}/{place}/anat/{name}_{mask}.nii.gz"]


def table(folder, *lines, header="subject,site,flair,mask,t1", name="cases.csv"):
    write_atomic(folder / name, "\n".join([header, *lines]) + "\n")
    return folder / name


T1W = Inputs(modalities=("t1",))


def atlas(subject, place="", space="space-MNI152NLin2009aSym_", mask="label-L_desc-T1lesion_mask", masks=""):
    """T1w scan and lesion mask of a subject as ATLAS v2.0 names them, the mask below `masks`."""
    anat, name = f"sub-{subject}/ses-1/anat/", f"sub-{subject}_ses-1_{space}"
    return [f"{place}{anat}{name}T1w.nii.gz", f"{place}{masks}{anat}{name}{mask}.nii.gz"]
