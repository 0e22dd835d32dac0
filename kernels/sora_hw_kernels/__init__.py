"""How the operators of `sora_hw.ops` are computed: one folder per kind of device."""
