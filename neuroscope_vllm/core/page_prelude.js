const $ = (id) => document.getElementById(id);
const page = JSON.parse($("data").textContent);
const make = (tag, text) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  return node;
};
