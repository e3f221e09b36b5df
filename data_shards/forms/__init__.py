"""The forms that samples are stored in; `data_shards.forms.opening` opens each."""
