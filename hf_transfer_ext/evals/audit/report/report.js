
var box = document.getElementById("search");
if (box) box.addEventListener("input", function () {
  var wanted = box.value.toLowerCase();
  document.querySelectorAll("#examples tbody tr").forEach(function (row) {
    row.hidden = row.textContent.toLowerCase().indexOf(wanted) < 0;
  });
});
