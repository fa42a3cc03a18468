"""Rows of figures, as `eval.score` writes them."""


def figure(value, half=0.0, n=2000):
    return {"value": value, "low": value - half, "high": value + half, "n": n} if half else {"value": value, "n": n}


def row(model, fid, half=0.5, steps=1, nfe=1, latency=0.002, **more):
    metrics = {"fid": figure(fid, half), "precision": figure(0.9 - fid / 100)}
    cost = {"nfe": nfe, "latency": latency, "images_per_second": 1 / latency, "peak_memory": 2**29, "hardware": "CPU A"}
    facts = {"protocol": "p", "protocol_hash": "aa11", "n": 2000, "extractor": "net", "extractor_hash": "e1"}
    made = {"seeds": [0, 1], "commit": "c0ffee", "hardware": "CPU A", "guidance": None, "kind": "pipeline"}
    return {"model": model, "steps": steps, "metrics": metrics, "cost": cost, **facts, **made, **more}
