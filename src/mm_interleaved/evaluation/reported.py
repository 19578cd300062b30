"""Values that the paper reports (arXiv 2401.10208), shown next to ours.

None of them was measured here. Those without ~ also appear in tables of later papers; the others were written from
memory and may be wrong in a digit, so nothing depends on them. Sets and protocols may differ as well: the release's
FID is of 64-pixel images, and its VQAv2 value may be of another split.
"""

from __future__ import annotations

PAPER: dict[tuple[str, str], tuple[str, str, str]] = {
    # task and phase: our name of the value, zero-shot after pre-training (the released kind of model), fine-tuned
    ("coco_karpathy", "test"): ("cider", "~129", "~140.5"),
    ("flickr30k", "test"): ("cider", "~85.8", "~93"),
    ("nocaps", "val"): ("cider", "~106.4", "~123.2"),
    ("image2paragraph", "test"): ("cider", "~23.5", "~30.3"),
    ("vqav2", "val"): ("accuracy_compat", "~57", "80.2"),
    ("okvqa", "val"): ("accuracy_compat", "~40", "~51.7"),
    ("gqa", "testdev"): ("accuracy_compat", "-", "60.5"),
    ("vizwiz_vqa", "val"): ("accuracy_compat", "~40.8", "54.9"),
    ("textvqa", "val"): ("accuracy_compat", "37.2", "61"),
    ("visdial", "val"): ("ndcg", "~48.7", "~53.7"),
    ("coco", "val"): ("fid_64", "~7.9", "-"),
    ("lncoco", "val"): ("fid_64", "~23.88", "-"),
    ("refcoco", "val"): ("accuracy", "-", "~89.92"),
    ("refcoco", "testA"): ("accuracy", "-", "~92.59"),
    ("refcoco", "testB"): ("accuracy", "-", "~86.54"),
    ("refcoco+", "val"): ("accuracy", "-", "~82.99"),
    ("refcoco+", "testA"): ("accuracy", "-", "~88.57"),
    ("refcoco+", "testB"): ("accuracy", "-", "~77.07"),
    ("refcocog", "val"): ("accuracy", "-", "~85.21"),
    ("refcocog", "test"): ("accuracy", "-", "~84.92"),
    ("ade20k", "validation"): ("miou", "-", "~44"),
    ("pororo", "test"): ("fid_64", "-", "~14.7"),
    ("flintstones", "test"): ("fid_64", "-", "~18.7"),
}
