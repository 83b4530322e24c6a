"""Arrays, tables and brain volumes of common file formats; nothing here knows of subjects or images."""
