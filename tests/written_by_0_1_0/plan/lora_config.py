# The smallest uniform rank found, in every target; module names are those of BertForSequenceClassification.
# Weight decay 0.120494: L2 on the LoRA factors, as SGD applies it, not AdamW.
# Made for its own fitted head, frozen: ranksure.install_planned_head(peft_model, PLAN).
# Labels by id: {0: 'bad', 1: 'good'}; num_labels=2.
from peft import LoraConfig

lora_config = LoraConfig(
    task_type='SEQ_CLS',
    r=2,
    target_modules='(?:bert\\.encoder\\.layer\\.1\\.attention\\.self\\.query|bert\\.encoder\\.layer\\.1\\.attention\\.self\\.value)',
    lora_alpha=2,
    modules_to_save=['classifier'],
)
