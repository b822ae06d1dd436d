# The smallest uniform rank found, in every target; module names are those of BertModel, with a head of its own.
# Weight decay 0.166396: L2 on the LoRA factors, as SGD applies it, not AdamW.
# Labels by id: {0: 'bad', 1: 'good'}; num_labels=2.
from peft import LoraConfig

lora_config = LoraConfig(
    task_type='FEATURE_EXTRACTION',
    r=1,
    target_modules='(?:encoder\\.layer\\.1\\.attention\\.self\\.query|encoder\\.layer\\.1\\.attention\\.self\\.value)',
    lora_alpha=1,
)
