"""Load one stage of a shared result with PEFT alone and print its groups' hashes.

    python examples/load_stage.py FOLDER STAGE [MODEL]

FOLDER is what `dymoe push` or `dymoe pull` wrote, STAGE counts from 1, MODEL is the base model where the manifest's
name for it means nothing on this machine (a folder).
"""

import json
import sys
from pathlib import Path

from peft import PeftModel

import dymoe  # registers its adapter with PEFT
from dymoe.models import load

folder, stage = sys.argv[1], int(sys.argv[2])
manifest = json.loads(Path(folder, "manifest.json").read_text(encoding="utf-8"))
base = load(sys.argv[3] if len(sys.argv) > 3 else manifest["base"], dtype="float32").model

first, *later = manifest["stages"][stage - 1]["groups"]
model = PeftModel.from_pretrained(base, folder, subfolder=first["folder"], adapter_name=first["name"])
for group in later:
    model.load_adapter(folder, subfolder=group["folder"], adapter_name=group["name"])

for group in (first, *later):
    same = dymoe.group_hash(model, group["name"]) == group["hash"]
    print(group["name"], group["hash"][:16], "as it was saved" if same else "NOT as it was saved")
