"""The names of the workloads, for help texts and shell completion, which must not wait for the import of torch."""

FAMILIES = (
    "led",
    "longformer",
    "longt5_local",
    "longt5_tglobal",
    "bigbird",
    "pegasus_x",
    "reformer",
    "reformer_local",
    "gpt_neox",
    "gpt_bigcode",
)
