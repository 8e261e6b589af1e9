"""What both reports share: the claim, and the machine."""

CLAIM = (1.05, 1.15)  # LayerNorm's time over RMSNorm's, where RMSNorm is "5-15 % faster"


def describe(report):
    m = report["machine"]
    where = f"{m['gpu']}; " if "gpu" in m else ""
    return [
        f"    {report['command']}",
        "",
        f"{where}{m['processor']}, {m['isa']}, {m['threads']} thread(s); torch {m['torch']}, "
        f"Python {m['python']}, "
        f"rmsnorm_cuda {m['rmsnorm_cuda']}. On a shared machine take differences under 10 % for "
        "noise.",
    ]


def title(report):
    m = report["machine"]
    device = m.get("gpu", f"{m['processor']}, {m['isa']}")
    return f"{device}, {m['threads']} thread(s), torch {m['torch']}"
