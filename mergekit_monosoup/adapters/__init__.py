"""LoRA adapters edited, inspected and compared as adapters, in matrices of their rank.

group.py       adapters of one base, module by module
command.py     `adapter`: its options, and what it prints
editing.py     adapters → records and an edited adapter
output.py      the folder of the edited adapter, there when it is whole
inspecting.py  `inspect ADAPTER`
comparing.py   `soup` over adapters
"""
