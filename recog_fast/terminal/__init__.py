"""What commands and training share at a terminal: parser, errors and JSON documents (`console`), bars (`progress`)."""
