"""Files only: dicts of tensors and metadata, no modules.

files.py       atomic files and folders, and what the disk may refuse
tensorfile.py  safetensors: headers checked before anything is allocated, writing in a stream
peft.py        the PEFT adapter folder (peft_config.py: its adapter_config.json)
base.py        the tensors of a base model's folder
fingerprint.py one hash for all weights of a base
run.py         the run folder
"""
