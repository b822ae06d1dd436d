"""Certified LoRA ranks in the NTK regime.

``plan`` answers which LoRA rank a fine-tuning needs, with a proof::

    import ranksure

    result = ranksure.plan("path/or/hub-id", "train.csv", target_modules=["query", "value"])
    for sentence in result.sentences():
        print(sentence)
    peft_config = result.lora_config      # a peft.LoraConfig
    result.save("plan")                   # plan.json and the solved adapter

``certify`` answers whether a finished LoRA run of the real network is done, and whether its rank is the limit::

    verdict = ranksure.certify(peft_model, dataloader, weight_decay=0.01)
    print(verdict.verdict, *verdict.advice())

The parts that they stand on are public too: ``ranksure.capture.capture`` a network, state a ``Problem``,
``solve`` it, ``certify_point`` any point of it. Blocks are addressed by qualified module names throughout.
"""

import lazy_loader

# Loaded on first use: `ranksure --help` and a typing mistake should not wait for torch. The names are in __init__.pyi.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
