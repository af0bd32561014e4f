"""SAEs in the formats of other libraries: one file here for each.

    saelens             write, read     folders of SAELens 6, also read by Neuronpedia's tools
    dictionary_learning write, read     `ae.pt` and `config.json`
    saebench            Adapter         an SAE in memory, for SAEBench's evaluations
    pth                 read_splatnlp, read_growth_signals

What a format cannot say is refused rather than left out: an SAE that another library reads as something
else is worse than none. None of these libraries has to be installed.
"""
