def test_smoke(pipeline):
    print(pipeline.stages)
    for k, s in pipeline.stages.items():
        m = pipeline.store.manifest(k, s.key)
        print(k, list(m.files), {a: (b if len(str(b)) < 1500 else "...") for a, b in m.extra.items()})
