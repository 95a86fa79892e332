"""Planning decides, before a save, which bytes go where and which rank writes them. Pure."""
